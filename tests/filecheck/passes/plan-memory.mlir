// RUN: sagec opt -p "plan-memory{alignment_bytes=64}" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "plan-memory{alignment_bytes=64},plan-memory{alignment_bytes=64}" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "plan-memory" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix WIDE

// The residual stream stays in one place: without something to add it is the embedding as it was,
// and later the sum is written over it. The all-reduce is in place, and the last norm takes both
// places of its operands. The 128 bytes that the ffn needs for itself, from 0, it needs while it
// runs: before, the tokens lie there, and afterwards the logits.
// CHECK-LABEL: exec.graph @one_layer {phase = "decode", model = "m", tp = 2, peak_bytes = 320, live_bytes = 320, naive_bytes = 832}
// CHECK-NEXT: %tokens = exec.input offsets #pd.column<0>
// CHECK-NEXT: %hidden = exec.embedding %tokens offsets #pd.column<128>
// CHECK-NEXT: %normed, %stream = exec.norm %hidden {layer = 0} offsets #pd.column<192, 128>
// CHECK-NEXT: %part = exec.ffn %normed {layer = 0, width = 8, scratch = 0} offsets #pd.column<256>
// CHECK-NEXT: %added = exec.all_reduce %part {layer = 0, in_place = 1} over [@g0, @g1] offsets #pd.column<256>
// CHECK-NEXT: %last, %sum = exec.norm %stream, %added {in_place = 1} offsets #pd.column<256, 128>
// CHECK-NEXT: %logits = exec.lm_head %last rows #pd.column<0, 1, 2, 3> offsets #pd.column<0>
// CHECK-NEXT: %next = exec.sample %logits offsets #pd.column<128>

// Places begin at multiples of 256 bytes where nobody says otherwise.
// WIDE-LABEL: exec.graph @one_layer
// WIDE: %normed, %stream = exec.norm %hidden {layer = 0} offsets #pd.column<512, 256>
exec.graph @one_layer {phase = "decode", model = "m", tp = 2} {
  %tokens = exec.input -> !exec.tensor<[4], i32, @g0>
  %hidden = exec.embedding %tokens -> !exec.tensor<[4, 8], bf16, @g0>
  %normed, %stream = exec.norm %hidden {layer = 0} -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  %part = exec.ffn %normed {layer = 0, width = 8} -> !exec.tensor<[4, 8], bf16, @g0>
  %added = exec.all_reduce %part {layer = 0} over [@g0, @g1] -> !exec.tensor<[4, 8], bf16, @g0>
  %last, %sum = exec.norm %stream, %added -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  %logits = exec.lm_head %last rows #pd.column<0, 1, 2, 3> -> !exec.tensor<[4, 16], bf16, @g0>
  %next = exec.sample %logits -> !exec.tensor<[4], i32, @g0>
  exec.yield %next
}

// What another stream reads stays until something surely runs behind that. %b is made long after
// the all-gather of %a should be done, and nothing says that it is: it keeps off [128, 192). %c is
// made behind a wait, and has its 256 bytes where %a was.
// CHECK-LABEL: exec.graph @other_stream
// CHECK-NEXT: %tokens = exec.input offsets #pd.column<0>
// CHECK-NEXT: %a = exec.embedding %tokens offsets #pd.column<128>
// CHECK-NEXT: %a_there = exec.wait %a {stream = "comm"} offsets #pd.column<128>
// CHECK-NEXT: %whole = exec.all_gather {{.*}} offsets #pd.column<256>
// CHECK-NEXT: %long = exec.embedding {{.*}} offsets #pd.column<192>
// CHECK-NEXT: %b = exec.ffn %long {width = 8, scratch = 0} offsets #pd.column<512>
// CHECK-NEXT: %whole_there = exec.wait %whole offsets #pd.column<256>
// CHECK-NEXT: %c = exec.ffn %whole_there {width = 8, scratch = 0} offsets #pd.column<384>
exec.graph @other_stream {phase = "decode", model = "m", tp = 2} {
  %tokens = exec.input -> !exec.tensor<[4], i32, @g0>
  %a = exec.embedding %tokens -> !exec.tensor<[4, 8], bf16, @g0>
  %a_there = exec.wait %a {stream = "comm"} -> !exec.tensor<[4, 8], bf16, @g0>
  %whole = exec.all_gather %a_there {stream = "comm", time_us = 1.0} over [@g0, @g1] -> !exec.tensor<[8, 8], bf16, @g0>
  %long = exec.embedding %tokens {time_us = 100.0} -> !exec.tensor<[4, 8], bf16, @g0>
  %b = exec.ffn %long {width = 8} -> !exec.tensor<[4, 8], bf16, @g0>
  %whole_there = exec.wait %whole -> !exec.tensor<[8, 8], bf16, @g0>
  %c = exec.ffn %whole_there {width = 8} -> !exec.tensor<[8, 8], bf16, @g0>
  exec.yield %b, %c
}

// Slices lie in what they are slices of, and a concat of parts one behind the other where they lie.
// Attention reads KV in the cache, which has no place here; KV from the host is copied, and has one.
// CHECK-LABEL: exec.graph @views
// CHECK: %whole = exec.embedding %tokens offsets #pd.column<[[W:[0-9]+]]>
// CHECK-NEXT: %top = exec.slice %whole offsets #pd.column<[[W]]>
// CHECK-NEXT: %bottom = exec.slice %whole {first = 3} offsets
// CHECK-NEXT: %again = exec.concat %top, %bottom offsets #pd.column<[[W]]>
// CHECK-NEXT: %near = exec.kv_load -> !exec.tensor
// CHECK-NEXT: %far = exec.kv_load {tier = "host"} offsets #pd.column<
exec.graph @views {phase = "decode", model = "m"} {
  %tokens = exec.input -> !exec.tensor<[4], i32, @g0>
  %whole = exec.embedding %tokens -> !exec.tensor<[4, 8], bf16, @g0>
  %top = exec.slice %whole -> !exec.tensor<[3, 8], bf16, @g0>
  %bottom = exec.slice %whole {first = 3} -> !exec.tensor<[1, 8], bf16, @g0>
  %again = exec.concat %top, %bottom -> !exec.tensor<[4, 8], bf16, @g0>
  %near = exec.kv_load -> !exec.tensor<[5, 2, 1, 4], bf16, @g0>
  %far = exec.kv_load {tier = "host"} -> !exec.tensor<[5, 2, 1, 4], bf16, @g0>
  exec.yield %again
}

// Attention of prompts needs room for what it makes of a chunk before that is put in its rows, and
// for a copy of KV that the chunk has behind it. New KV that goes to the cache as it is needs none:
// it is columns of %qkv, here of the rows from 2 on. What other ranks send is put together along
// columns, and two tensors are one message.
// CHECK-LABEL: exec.graph @scratch
// CHECK: %qkv = exec.embedding %tokens offsets #pd.column<1856>
// CHECK-NEXT: %near = exec.kv_load -> !exec.tensor
// CHECK-NEXT: %out, %new = exec.prefill_attention %qkv, %near {{.*}} first = 2, scratch = 0} {{.*}} offsets #pd.column<1984, 1904>
// CHECK: %whole = exec.all_gather %out {axis = 1, scratch = 64} {{.*}} offsets #pd.column<0>
// CHECK: %a, %b = exec.all_reduce %out, %whole {in_place = 1, scratch = 64} {{.*}} offsets #pd.column<1984, 0>
exec.graph @scratch {phase = "prefill", model = "m", tp = 2} {
  %tokens = exec.input -> !exec.tensor<[4], i32, @g0>
  %qkv = exec.embedding %tokens -> !exec.tensor<[4, 12], bf16, @g0>
  %near = exec.kv_load -> !exec.tensor<[5, 2, 1, 4], bf16, @g0>
  %out, %new = exec.prefill_attention %qkv, %near {heads = 1, kv_heads = 1, head_dim = 4, first = 2} begin #pd.column<5> end #pd.column<7> -> !exec.tensor<[2, 4], bf16, @g0>, !exec.tensor<[2, 2, 1, 4], bf16, @g0>
  exec.kv_store %new : !exec.tensor<[2, 2, 1, 4], bf16, @g0>
  %whole = exec.all_gather %out {axis = 1} over [@g0, @g1] -> !exec.tensor<[2, 8], bf16, @g0>
  %a, %b = exec.all_reduce %out, %whole over [@g0, @g1] -> !exec.tensor<[2, 4], bf16, @g0>, !exec.tensor<[2, 8], bf16, @g0>
  exec.yield %a, %b
}

// A plan that is there already stays where it is as small, even if the pass would find another.
// CHECK-LABEL: exec.graph @planned {{.*}}peak_bytes = 144
// CHECK-NEXT: %tokens = exec.input offsets #pd.column<128>
// CHECK-NEXT: %first = exec.embedding %tokens offsets #pd.column<64>
// CHECK-NEXT: %second = exec.embedding %tokens offsets #pd.column<0>
exec.graph @planned {phase = "decode", model = "m"} {
  %tokens = exec.input offsets #pd.column<128> -> !exec.tensor<[4], i32, @g0>
  %first = exec.embedding %tokens offsets #pd.column<64> -> !exec.tensor<[4, 8], bf16, @g0>
  %second = exec.embedding %tokens offsets #pd.column<0> -> !exec.tensor<[4, 8], bf16, @g0>
  exec.yield %first, %second
}

// One that is wrong does not: here both tensors are needed at a time.
// CHECK-LABEL: exec.graph @planned_badly {{.*}}peak_bytes = 80
// CHECK-NEXT: %tokens = exec.input offsets #pd.column<64>
// CHECK-NEXT: %hidden = exec.embedding %tokens offsets #pd.column<0>
exec.graph @planned_badly {phase = "decode", model = "m"} {
  %tokens = exec.input offsets #pd.column<0> -> !exec.tensor<[4], i32, @g0>
  %hidden = exec.embedding %tokens offsets #pd.column<0> -> !exec.tensor<[4, 8], bf16, @g0>
  exec.yield %hidden
}

// -----

// Beside weights and KV there must be room: half of both, for a rank of two.
// CHECK: error: exec.graph @large: 3.052 MiB of activations beside 0.0008545 MiB of weights and
// CHECK-SAME: 7.812 MiB of KV do not fit @g0's 9.537 MiB: 1.328 MiB too many
// CHECK: what would: fewer kv_blocks, or fewer tokens in the step
cluster.model @m {layers = 1, hidden = 8, heads = 2, kv_heads = 2, head_dim = 4, ffn = 16, vocab = 16}
cluster.device @g0 {memory_bytes = 10000000}
cluster.device @g1 like @g0
cluster.instance @i on [@g0, @g1] engine "sim" role both model @m {tp = 2, kv_blocks = 32000, block_tokens = 16}
exec.graph @large {phase = "decode", model = "m", instance = "i", tp = 2} {
  %tokens = exec.input -> !exec.tensor<[100000], i32, @g0>
  %hidden = exec.embedding %tokens -> !exec.tensor<[100000, 8], bf16, @g0>
  %n, %s = exec.norm %hidden -> !exec.tensor<[100000, 8], bf16, @g0>, !exec.tensor<[100000, 8], bf16, @g0>
  exec.yield %n
}

// -----

// A KV head that ranks share is whole on each of them.
// CHECK: error: exec.graph @shared_head: 3.052 MiB of activations beside 0.0007935 MiB of weights and
// CHECK-SAME: 7.812 MiB of KV do not fit @g0's 9.537 MiB: 1.328 MiB too many
cluster.model @m {layers = 1, hidden = 8, heads = 2, kv_heads = 1, head_dim = 4, ffn = 16, vocab = 16}
cluster.device @g0 {memory_bytes = 10000000}
cluster.device @g1 like @g0
cluster.instance @i on [@g0, @g1] engine "sim" role both model @m {tp = 2, kv_blocks = 32000, block_tokens = 16}
exec.graph @shared_head {phase = "decode", model = "m", instance = "i", tp = 2} {
  %tokens = exec.input -> !exec.tensor<[100000], i32, @g0>
  %hidden = exec.embedding %tokens -> !exec.tensor<[100000, 8], bf16, @g0>
  %n, %s = exec.norm %hidden -> !exec.tensor<[100000, 8], bf16, @g0>, !exec.tensor<[100000, 8], bf16, @g0>
  exec.yield %n
}
