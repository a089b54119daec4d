// RUN: sagec compile --emit ir --pipeline order %s | filecheck %s

model m { layers 4 hidden 256 heads 8 kv_heads 2 ffn 688 vocab 1024 }
cluster c { device d; instance i on d engine sim kv_blocks 64 }

// Arrivals count from the first request of the trace and come twice as fast; prompts are cut.
// CHECK: "trace-0": prompt 374 generate 44 priority 3,
// CHECK-NEXT: "trace-1": prompt 380 generate 109 arrived 2157290 priority 3,
// CHECK-NEXT: "later": prompt 4 arrived 9000000
serve {
  replay "Inputs/trace.csv" rate 2.0 limit 2 clip 380 priority 3
  request "later" tokens 4 arrives 9s
}
