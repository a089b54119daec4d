// RUN: sagec compile --emit ir --pipeline order %s | filecheck %s

// Requests for different models travel in one wave, and say which.
model small { layers 1 hidden 64 heads 2 ffn 128 vocab 512 tied yes }
model large { layers 8 hidden 64 heads 2 ffn 128 vocab 512 dtype fp8 experts 8 experts_per_token 2 }

// CHECK: cluster.model @small {{{.*}}tied = 1}
// CHECK: cluster.model @large {{{.*}}dtype = "fp8", experts = 8, experts_per_token = 2}
cluster c {
  device d
  instance i on d engine sim model small kv_blocks 64
  instance j on d engine sim model large kv_blocks 64
}

// CHECK: "a": prompt 4 model @large
// CHECK: "b": prompt 5 model @small
serve model small {
  request "a" tokens 4 model large
  request "b" tokens 5
}
