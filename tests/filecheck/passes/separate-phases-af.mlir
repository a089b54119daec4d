// RUN: sagec opt -p "separate-phases{scheme=af ffn=f0 micro_batches=2}" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "separate-phases{scheme=af ffn=f0},separate-phases{scheme=af ffn=f0}" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "separate-phases{scheme=af}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix NONE

// Two requests a micro-batch. While @f0 computes the feed-forward of the first, @g0 attends for the
// second: 86 us and not 136. Only the layer is parted; its ends take all rows, as before.
// CHECK-LABEL: exec.graph @one_layer
// CHECK: %hidden = exec.embedding %tokens
// CHECK-NEXT: %hidden.0 = exec.slice %hidden {layer = 0} -> !exec.tensor<[2, 8], bf16, @g0>
// CHECK-NEXT: %hidden.1 = exec.slice %hidden {layer = 0, first = 2} -> !exec.tensor<[2, 8], bf16, @g0>
// CHECK-NEXT: %normed.0, %stream.0 = exec.norm %hidden.0
// CHECK-NEXT: %qkv.0 = exec.qkv %normed.0
// CHECK-NEXT: %kv = exec.kv_load {layer = 0} -> !exec.tensor<[4000, 2, 1, 4], bf16, @g0>
// CHECK-NEXT: %kv.0 = exec.slice %kv {layer = 0} -> !exec.tensor<[1900, 2, 1, 4], bf16, @g0>
// CHECK-NEXT: %attended.0, %new.0 = exec.decode_attention %qkv.0, %kv.0 {layer = 0, time_us = 32.093, flops = 30432.0, bytes = 30528.0, {{.*}} context #pd.column<1000, 900>
// CHECK-NEXT: exec.kv_store %new.0
// CHECK-NEXT: %added.0 = exec.projection %attended.0
// CHECK-NEXT: %n2.0, %stream2.0 = exec.norm %stream.0, %added.0
// CHECK-NEXT: %[[N:.*]] = exec.wait %n2.0 {stream = "comm", layer = 0}
// CHECK-NEXT: exec.send %[[N]] {stream = "comm", layer = 0, time_us = 0.532, bytes = 32.0, channel = 0} to @f0
// CHECK: %n2.0.f0 = exec.recv {stream = "comm", layer = 0, bytes = 32.0, channel = 0} from @g0 -> !exec.tensor<[2, 8], bf16, @f0>
// CHECK-NEXT: %[[R:.*]] = exec.wait %n2.0.f0 {stream = "compute", layer = 0}
// CHECK-NEXT: %f.0 = exec.ffn %[[R]] {layer = 0, time_us = 30.684, flops = 30000.0, bytes = 960.0, width = 16} -> !exec.tensor<[2, 8], bf16, @f0>
// CHECK: %attended.1, %new.1 = exec.decode_attention %qkv.1, %kv.1
// CHECK: %f.0.g0 = exec.recv
// CHECK: %f.1 = exec.ffn
// CHECK: %f = exec.concat
// CHECK-NEXT: %last, %sum = exec.norm %stream2, %f -> !exec.tensor<[4, 8], bf16, @g0>

// Where feed-forward goes must be said.
// NONE: error: scheme=af: ffn= is missing
// NONE: say where feed-forward goes, one of: @g0, @f0

cluster.model @m {layers = 1, hidden = 8, heads = 2, kv_heads = 1, head_dim = 4, ffn = 16, vocab = 16}
cluster.device @g0 {flops_per_s = 1.0e9, bytes_per_s = 1.0e9}
cluster.device @f0 like @g0
cluster.link @g0 to @f0 {bytes_per_s = 1.0e9, latency_us = 0.5}
exec.graph @one_layer {phase = "decode", model = "m"} {
  %tokens = exec.input -> !exec.tensor<[4], i32, @g0>
  %hidden = exec.embedding %tokens {time_us = 2.0} -> !exec.tensor<[4, 8], bf16, @g0>
  %normed, %stream = exec.norm %hidden {layer = 0, time_us = 2.0} -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  %qkv = exec.qkv %normed {layer = 0, time_us = 2.5, flops = 1000.0, bytes = 448.0, heads = 2, kv_heads = 1, head_dim = 4} -> !exec.tensor<[4, 16], bf16, @g0>
  %kv = exec.kv_load {layer = 0} -> !exec.tensor<[4000, 2, 1, 4], bf16, @g0>
  %attended, %new = exec.decode_attention %qkv, %kv {layer = 0, time_us = 66.0, flops = 64064.0, bytes = 64256.0, heads = 2, kv_heads = 1, head_dim = 4} context #pd.column<1000, 900, 1000, 1100> -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 2, 1, 4], bf16, @g0>
  exec.kv_store %new {layer = 0, time_us = 2.0}
  %added = exec.projection %attended {layer = 0, time_us = 2.0} -> !exec.tensor<[4, 8], bf16, @g0>
  %n2, %stream2 = exec.norm %stream, %added {layer = 0, time_us = 2.0} -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  %f = exec.ffn %n2 {layer = 0, time_us = 60.0, flops = 60000.0, bytes = 1024.0, width = 16} -> !exec.tensor<[4, 8], bf16, @g0>
  %last, %sum = exec.norm %stream2, %f -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  %logits = exec.lm_head %last rows #pd.column<0, 1, 2, 3> -> !exec.tensor<[4, 16], bf16, @g0>
  %next = exec.sample %logits -> !exec.tensor<[4], i32, @g0>
  exec.yield %next
}

// -----

// The dead zone: over a slow link the rows are longer on their way than either pool computes.
// CHECK: error: scheme=af does not pay: exec.graph @one_layer takes 138.5 us as it is and 429.1 us
// CHECK-SAME: with feed-forward on @f0 in 2 micro-batches
// CHECK: layer 0 then takes 87.4 us of attention, 61.4 us of feed-forward, and
// CHECK-SAME: messages of 214.3 us there and 214.3 us back; dead zone: the link is busy longer than either pool computes

cluster.model @m {layers = 1, hidden = 8, heads = 2, kv_heads = 1, head_dim = 4, ffn = 16, vocab = 16}
cluster.device @g0 {flops_per_s = 1.0e9, bytes_per_s = 1.0e9}
cluster.device @f0 like @g0
cluster.link @g0 to @f0 {bytes_per_s = 3.0e5, latency_us = 0.5}
exec.graph @one_layer {phase = "decode", model = "m"} {
  %tokens = exec.input -> !exec.tensor<[4], i32, @g0>
  %hidden = exec.embedding %tokens {time_us = 2.0} -> !exec.tensor<[4, 8], bf16, @g0>
  %normed, %stream = exec.norm %hidden {layer = 0, time_us = 2.0} -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  %qkv = exec.qkv %normed {layer = 0, time_us = 2.5, flops = 1000.0, bytes = 448.0, heads = 2, kv_heads = 1, head_dim = 4} -> !exec.tensor<[4, 16], bf16, @g0>
  %kv = exec.kv_load {layer = 0} -> !exec.tensor<[4000, 2, 1, 4], bf16, @g0>
  %attended, %new = exec.decode_attention %qkv, %kv {layer = 0, time_us = 66.0, flops = 64064.0, bytes = 64256.0, heads = 2, kv_heads = 1, head_dim = 4} context #pd.column<1000, 900, 1000, 1100> -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 2, 1, 4], bf16, @g0>
  exec.kv_store %new {layer = 0, time_us = 2.0}
  %added = exec.projection %attended {layer = 0, time_us = 2.0} -> !exec.tensor<[4, 8], bf16, @g0>
  %n2, %stream2 = exec.norm %stream, %added {layer = 0, time_us = 2.0} -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  %f = exec.ffn %n2 {layer = 0, time_us = 60.0, flops = 60000.0, bytes = 1024.0, width = 16} -> !exec.tensor<[4, 8], bf16, @g0>
  %last, %sum = exec.norm %stream2, %f -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  %logits = exec.lm_head %last rows #pd.column<0, 1, 2, 3> -> !exec.tensor<[4, 16], bf16, @g0>
  %next = exec.sample %logits -> !exec.tensor<[4], i32, @g0>
  exec.yield %next
}

// -----

// Rows of one request stay together.
// CHECK: error: scheme=af: exec.graph @alone computes 1 request together, too few for 2
// CHECK: at most micro_batches=1
cluster.model @m {layers = 1, hidden = 8, heads = 2, kv_heads = 1, head_dim = 4, ffn = 16, vocab = 16}
cluster.device @g0
cluster.device @f0 like @g0
exec.graph @alone {phase = "prefill", model = "m"} {
  %tokens = exec.input -> !exec.tensor<[4], i32, @g0>
  %hidden = exec.embedding %tokens -> !exec.tensor<[4, 8], bf16, @g0>
  %normed, %stream = exec.norm %hidden {layer = 0} -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  %qkv = exec.qkv %normed {layer = 0, heads = 2, kv_heads = 1, head_dim = 4} -> !exec.tensor<[4, 16], bf16, @g0>
  %kv = exec.kv_load {layer = 0} -> !exec.tensor<[0, 2, 1, 4], bf16, @g0>
  %attended, %new = exec.prefill_attention %qkv, %kv {layer = 0, heads = 2, kv_heads = 1, head_dim = 4} begin #pd.column<0> end #pd.column<4> -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 2, 1, 4], bf16, @g0>
  %added = exec.projection %attended {layer = 0} -> !exec.tensor<[4, 8], bf16, @g0>
  %f = exec.ffn %added {layer = 0, width = 16} -> !exec.tensor<[4, 8], bf16, @g0>
  exec.yield %f
}
