// RUN: sagec compile --emit ir --pipeline order %s | filecheck %s

model m { layers 4 hidden 256 heads 8 kv_heads 2 ffn 688 vocab 1024 }
cluster c { device d; instance i on d engine sim kv_blocks 64 }

// What serve says becomes the graph's; all requests are one op.
// CHECK: pd.graph @serve {policy = "fifo", mode = "time-share", horizon = 8} {
// CHECK-NEXT: %[[new:.*]] = pd.requests [
serve with fifo mode time-share chunk 64 horizon 8 ttft 200ms {
  // Times are in microseconds; a ttft of its own wins over that of serve.
  // CHECK-NEXT: "first": prompt 12 generate 4 ttft 200000,
  request "first" tokens 12 generate 4
  // CHECK-NEXT: "second": prompt 7 arrived 10000 priority -1 ttft 2000000 tpot 50000 tenant "acme" session "s 1",
  request "second" tokens 7 arrives 10ms priority -1 ttft 2s tpot 50ms tenant acme session "s 1"
  // CHECK-NEXT: "third": prompt 5 ttft 200000 adapter "lora" samples 2 chunk 4 on @i decode_on @i
  request "third" tokens 5 adapter lora samples 2 chunk 4 on i decode_on i
}
// CHECK-NEXT: ] : !pd.wave<3>
// CHECK-NEXT: %[[kv:.*]] = pd.prefill %[[new]] chunk 64 : !pd.kv<3>
// CHECK-NEXT: %[[end:.*]] = pd.decode %[[kv]] : !pd.kv<3>
// CHECK-NEXT: pd.yield %[[end]] : !pd.kv<3>
