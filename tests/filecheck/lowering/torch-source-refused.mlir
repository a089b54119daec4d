// RUN: sagec opt -t torch --split-input-file --verify-diagnostics %s | filecheck %s

// Without exec graphs there is nothing to write.
// CHECK: the module has no exec.graph; run convert-pd-to-exec first
cluster.device @g0

// -----

// Pipeline stages.
// CHECK: exec.graph @stages has pp 2
// CHECK: the torch engine has no pipeline stages: pp 1
exec.graph @stages {phase = "decode", model = "m", pp = 2} {
  %0 = exec.input -> !exec.tensor<[1], i32, @g0>
  exec.yield %0
}

// -----

// Replicas.
// CHECK: exec.graph @replicas has dp 2
// CHECK: the torch engine has no replicas: dp 1
exec.graph @replicas {phase = "decode", model = "m", dp = 2} {
  %0 = exec.input -> !exec.tensor<[1], i32, @g0>
  exec.yield %0
}

// -----

// Operators that no engine of one stage has.
// CHECK: exec.send: the torch engine has no code for it
exec.graph @sent {phase = "decode", model = "m"} {
  %0 = exec.input -> !exec.tensor<[1], i32, @g0>
  %1 = exec.embedding %0 -> !exec.tensor<[1, 8], f32, @g0>
  exec.send %1 {channel = 0} to @g1
  %2 = exec.recv {channel = 0} from @g0 -> !exec.tensor<[1, 8], f32, @g1>
  exec.yield %2
}

// -----

// A step that gives no logits.
// CHECK: exec.graph @silent samples none of its tokens
// CHECK: the torch engine wants logits of a step
exec.graph @silent {phase = "decode", model = "m"} {
  %0 = exec.input -> !exec.tensor<[1], i32, @g0>
  %1 = exec.embedding %0 -> !exec.tensor<[1, 8], f32, @g0>
  exec.yield %1
}

// -----

// A norm whose weights nobody can tell.
// CHECK: exec.norm: neither exec.qkv, exec.ffn nor exec.lm_head takes its result, so nobody knows its weights
exec.graph @norm_for_nobody {phase = "decode", model = "m"} {
  %0 = exec.input -> !exec.tensor<[1], i32, @g0>
  %1 = exec.embedding %0 -> !exec.tensor<[1, 8], f32, @g0>
  %2, %3 = exec.norm %1 {layer = 0} -> !exec.tensor<[1, 8], f32, @g0>, !exec.tensor<[1, 8], f32, @g0>
  exec.yield %2
}

// -----

// Rows that are no batch: a slice from the middle of one part to the middle of the next.
// CHECK: exec.prefill_attention has rows [0, 3) of a step that is cut at 2, 3
// CHECK: it must have one part, or all
exec.graph @crossed {phase = "prefill", model = "m"} {
  %0 = exec.input -> !exec.tensor<[4], i32, @g0>
  %1 = exec.embedding %0 -> !exec.tensor<[4, 8], f32, @g0>
  %2, %3 = exec.norm %1 {layer = 0} -> !exec.tensor<[4, 8], f32, @g0>, !exec.tensor<[4, 8], f32, @g0>
  %4 = exec.slice %2 {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>
  %5 = exec.slice %2 {layer = 0, first = 2} -> !exec.tensor<[2, 8], f32, @g0>
  %6 = exec.qkv %4 {layer = 0, heads = 2, kv_heads = 1, head_dim = 4} -> !exec.tensor<[3, 16], f32, @g0>
  %7 = exec.kv_load {layer = 0} -> !exec.tensor<[0, 2, 1, 4], f32, @g0>
  %8, %9 = exec.prefill_attention %6, %7 {layer = 0, heads = 2, kv_heads = 1, head_dim = 4} begin #pd.column<0> end #pd.column<3> -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 2, 1, 4], f32, @g0>
  exec.yield %8
}

// -----

// A projection of some of the rows.
// CHECK: exec.projection has some of the rows that attention gives
// CHECK: the torch engine projects all of them at once
exec.graph @partly_projected {phase = "hybrid", model = "m"} {
  %0 = exec.input -> !exec.tensor<[3], i32, @g0>
  %1 = exec.embedding %0 -> !exec.tensor<[3, 8], f32, @g0>
  %2, %3 = exec.norm %1 {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 8], f32, @g0>
  %4 = exec.qkv %2 {layer = 0, heads = 2, kv_heads = 1, head_dim = 4} -> !exec.tensor<[3, 16], f32, @g0>
  %5 = exec.kv_load {layer = 0} -> !exec.tensor<[0, 2, 1, 4], f32, @g0>
  %6, %7 = exec.prefill_attention %4, %5 {layer = 0, heads = 2, kv_heads = 1, head_dim = 4} begin #pd.column<0> end #pd.column<2> -> !exec.tensor<[2, 8], f32, @g0>, !exec.tensor<[2, 2, 1, 4], f32, @g0>
  %8 = exec.projection %6 {layer = 0} -> !exec.tensor<[2, 8], f32, @g0>
  exec.yield %8
}

// -----

// Two steps of one phase that compute differently have no common function.
// CHECK: exec.graph @short and exec.graph @long are both of phase decode and compute differently
// CHECK: a program has one function a phase
exec.graph @short {phase = "decode", model = "m"} {
  %0 = exec.input -> !exec.tensor<[1], i32, @g0>
  %1 = exec.embedding %0 -> !exec.tensor<[1, 8], f32, @g0>
  %2 = exec.lm_head %1 rows #pd.column<0> -> !exec.tensor<[1, 10], f32, @g0>
  %3 = exec.sample %2 -> !exec.tensor<[1], i32, @g0>
  exec.yield %3
}
exec.graph @long {phase = "decode", model = "m"} {
  %0 = exec.input -> !exec.tensor<[1], i32, @g0>
  %1 = exec.embedding %0 -> !exec.tensor<[1, 8], f32, @g0>
  %2, %3 = exec.norm %1 -> !exec.tensor<[1, 8], f32, @g0>, !exec.tensor<[1, 8], f32, @g0>
  %4 = exec.lm_head %2 rows #pd.column<0> -> !exec.tensor<[1, 10], f32, @g0>
  %5 = exec.sample %4 -> !exec.tensor<[1], i32, @g0>
  exec.yield %5
}

// -----

// A program is of one model.
// CHECK: exec.graph @wide has hidden 16, exec.graph @narrow 8
// CHECK: a program has one shape
exec.graph @narrow {phase = "decode", model = "m"} {
  %0 = exec.input -> !exec.tensor<[1], i32, @g0>
  %1 = exec.embedding %0 -> !exec.tensor<[1, 8], f32, @g0>
  %2 = exec.lm_head %1 rows #pd.column<0> -> !exec.tensor<[1, 10], f32, @g0>
  %3 = exec.sample %2 -> !exec.tensor<[1], i32, @g0>
  exec.yield %3
}
exec.graph @wide {phase = "prefill", model = "m"} {
  %0 = exec.input -> !exec.tensor<[1], i32, @g0>
  %1 = exec.embedding %0 -> !exec.tensor<[1, 16], f32, @g0>
  %2 = exec.lm_head %1 rows #pd.column<0> -> !exec.tensor<[1, 10], f32, @g0>
  %3 = exec.sample %2 -> !exec.tensor<[1], i32, @g0>
  exec.yield %3
}
