// RUN: sagec opt %s | sagec opt - | filecheck %s
// RUN: sagec opt --print-op-generic %s | sagec opt - | filecheck %s
// RUN: sagec opt --print-op-generic %s | filecheck %s --check-prefix=GENERIC

// A step of one chunk and one decode through a layer, on one device.
// CHECK-LABEL: exec.graph @a_layer {phase = "hybrid", model = "m", instance = "i0", peak_bytes = 512}
// GENERIC: "exec.graph"() <{sym_name = "a_layer", phase = "hybrid", model = "m", instance = "i0", peak_bytes = 512 : i64}> ({
exec.graph @a_layer {phase = "hybrid", model = "m", instance = "i0", peak_bytes = 512} {
  // CHECK-NEXT: %tokens = exec.input -> !exec.tensor<[4], i32, @g0>
  // GENERIC: %tokens = "exec.input"() : () -> !exec.tensor<[4], i32, @g0>
  %tokens = exec.input -> !exec.tensor<[4], i32, @g0>
  // CHECK-NEXT: %hidden = exec.embedding %tokens {time_us = 2.5, bytes = 80.0} -> !exec.tensor<[4, 8], bf16, @g0>
  // GENERIC: %hidden = "exec.embedding"(%tokens) <{bytes = 8.000000e+01 : f64, time_us = 2.500000e+00 : f64}>
  %hidden = exec.embedding %tokens {bytes = 80, time_us = 2.5} -> !exec.tensor<[4, 8], bf16, @g0>
  // CHECK-NEXT: %normed, %sum = exec.norm %hidden {layer = 0, flops = 128.0} -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  %normed, %sum = exec.norm %hidden {layer = 0, flops = 128} -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  // CHECK-NEXT: %qkv = exec.qkv %normed {layer = 0, heads = 4, kv_heads = 2, head_dim = 2} -> !exec.tensor<[4, 16], bf16, @g0>
  // GENERIC: %qkv = "exec.qkv"(%normed) <{layer = 0 : i64, heads = 4 : i64, kv_heads = 2 : i64, head_dim = 2 : i64}>
  %qkv = exec.qkv %normed {layer = 0, heads = 4, kv_heads = 2, head_dim = 2} -> !exec.tensor<[4, 16], bf16, @g0>
  // CHECK-NEXT: %old = exec.kv_load {layer = 0, tier = "host"} -> !exec.tensor<[5, 2, 2, 2], int8, @g0>
  // GENERIC: %old = "exec.kv_load"() <{layer = 0 : i64, tier = "host"}>
  %old = exec.kv_load {layer = 0, tier = "host"} -> !exec.tensor<[5, 2, 2, 2], int8, @g0>
  // CHECK-NEXT: %a, %new = exec.prefill_attention %qkv, %old {heads = 4, kv_heads = 2, head_dim = 2} begin #pd.column<5, 0> end #pd.column<7, 1> -> !exec.tensor<[3, 8], bf16, @g0>, !exec.tensor<[3, 2, 2, 2], int8, @g0>
  // GENERIC: "exec.prefill_attention"(%qkv, %old) <{heads = 4 : i64, kv_heads = 2 : i64, head_dim = 2 : i64, begin = #pd.column<5, 0>, end = #pd.column<7, 1>}>
  %a, %new = exec.prefill_attention %qkv, %old {heads = 4, kv_heads = 2, head_dim = 2} begin #pd.column<5, 0> end #pd.column<7, 1> -> !exec.tensor<[3, 8], bf16, @g0>, !exec.tensor<[3, 2, 2, 2], int8, @g0>
  // CHECK-NEXT: exec.kv_store %new {layer = 0, tier = "device"}
  // GENERIC: "exec.kv_store"(%new) <{layer = 0 : i64, tier = "device"}>
  exec.kv_store %new {layer = 0, tier = "device"}
  // CHECK-NEXT: %kv = exec.kv_load -> !exec.tensor<[9, 2, 2, 2], int8, @g0>
  %kv = exec.kv_load -> !exec.tensor<[9, 2, 2, 2], int8, @g0>
  // CHECK-NEXT: %b, %last = exec.decode_attention %qkv, %kv {heads = 4, kv_heads = 2, head_dim = 2, first = 3} context #pd.column<9> -> !exec.tensor<[1, 8], bf16, @g0>, !exec.tensor<[1, 2, 2, 2], int8, @g0>
  // GENERIC: %b, %last = "exec.decode_attention"(%qkv, %kv) <{heads = 4 : i64, kv_heads = 2 : i64, head_dim = 2 : i64, first = 3 : i64, context = #pd.column<9>}>
  %b, %last = exec.decode_attention %qkv, %kv {heads = 4, kv_heads = 2, head_dim = 2, first = 3} context #pd.column<9> -> !exec.tensor<[1, 8], bf16, @g0>, !exec.tensor<[1, 2, 2, 2], int8, @g0>
  // CHECK-NEXT: %added = exec.projection %a, %b -> !exec.tensor<[4, 8], bf16, @g0>
  // GENERIC: %added = "exec.projection"(%a, %b)
  %added = exec.projection %a, %b -> !exec.tensor<[4, 8], bf16, @g0>
  // CHECK-NEXT: %n, %s = exec.norm %sum, %added {in_place = 1} offsets #pd.column<0, 64> -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  // GENERIC: "exec.norm"(%sum, %added) <{in_place = 1 : i64, offsets = #pd.column<0, 64>}>
  %n, %s = exec.norm %sum, %added {in_place = 1} offsets #pd.column<0, 64> -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  // CHECK-NEXT: %f = exec.ffn %n {width = 12} -> !exec.tensor<[4, 8], bf16, @g0>
  // GENERIC: %f = "exec.ffn"(%n) <{width = 12 : i64}>
  %f = exec.ffn %n {width = 12} -> !exec.tensor<[4, 8], bf16, @g0>
  // CHECK-NEXT: %logits = exec.lm_head %f rows #pd.column<2, 3> -> !exec.tensor<[2, 20], f32, @g0>
  // GENERIC: %logits = "exec.lm_head"(%f) <{rows = #pd.column<2, 3>}>
  %logits = exec.lm_head %f rows #pd.column<2, 3> -> !exec.tensor<[2, 20], f32, @g0>
  // CHECK-NEXT: %next = exec.sample %logits -> !exec.tensor<[2], i32, @g0>
  // GENERIC: %next = "exec.sample"(%logits)
  %next = exec.sample %logits -> !exec.tensor<[2], i32, @g0>
  // CHECK-NEXT: exec.yield %next, %s
  // GENERIC: "exec.yield"(%next, %s) : (!exec.tensor<[2], i32, @g0>, !exec.tensor<[4, 8], bf16, @g0>) -> ()
  exec.yield %next, %s
}

// Experts, of which this rank has four.
// CHECK-LABEL: exec.graph @experts {model = "m"}
exec.graph @experts {model = "m"} {
  %tokens = exec.input -> !exec.tensor<[4], i32, @g0>
  %hidden = exec.embedding %tokens -> !exec.tensor<[4, 8], fp8, @g0>
  // CHECK: exec.ffn %hidden {width = 12, experts = 4, experts_per_token = 2, scratch = 64} -> !exec.tensor<[4, 8], fp8, @g0>
  %f = exec.ffn %hidden {width = 12, experts = 4, experts_per_token = 2, scratch = 64} -> !exec.tensor<[4, 8], fp8, @g0>
  exec.yield
}

// What all ranks do together; several tensors in one message.
// CHECK-LABEL: exec.graph @collectives {model = "m", tp = 2}
exec.graph @collectives {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %x = exec.embedding %t -> !exec.tensor<[4, 8], f16, @g0>
  // CHECK: %y, %z = exec.all_reduce %x, %t {bytes = 64.0} over [@g0, @"gpu-1"] -> !exec.tensor<[4, 8], f16, @g0>, !exec.tensor<[4], i32, @g0>
  // GENERIC: "exec.all_reduce"(%x, %t) <{bytes = 6.400000e+01 : f64, ranks = [@g0, @"gpu-1"]}>
  %y, %z = exec.all_reduce %x, %t {bytes = 64} over [@g0, @"gpu-1"] -> !exec.tensor<[4, 8], f16, @g0>, !exec.tensor<[4], i32, @g0>
  // CHECK-NEXT: exec.all_gather %y {axis = 1} over [@g1, @g0] -> !exec.tensor<[4, 16], f16, @g0>
  // GENERIC: %w = "exec.all_gather"(%y) <{axis = 1 : i64, ranks = [@g1, @g0]}>
  %w = exec.all_gather %y {axis = 1} over [@g1, @g0] -> !exec.tensor<[4, 16], f16, @g0>
  // CHECK-NEXT: exec.reduce_scatter %w over [@g0, @g1] -> !exec.tensor<[2, 16], f16, @g0>
  // GENERIC: %s = "exec.reduce_scatter"(%w) <{ranks = [@g0, @g1]}>
  %s = exec.reduce_scatter %w over [@g0, @g1] -> !exec.tensor<[2, 16], f16, @g0>
  exec.yield %s
}

// Stages of a pipeline: the channel says which send and which recv are one message.
// CHECK-LABEL: exec.graph @stages {model = "m", pp = 2, dp = 1, live_bytes = 16, naive_bytes = 32}
exec.graph @stages {model = "m", pp = 2, dp = 1, live_bytes = 16, naive_bytes = 32} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  // CHECK: exec.send %t {time_us = 5.0, channel = 3} to @g1
  // GENERIC: "exec.send"(%t) <{time_us = 5.000000e+00 : f64, channel = 3 : i64, peer = @g1}>
  exec.send %t {time_us = 5, channel = 3} to @g1
  // CHECK-NEXT: exec.recv {channel = 3} from @g0 -> !exec.tensor<[4], i32, @g1>
  // GENERIC: %u = "exec.recv"() <{channel = 3 : i64, peer = @g0}>
  %u = exec.recv {channel = 3} from @g0 -> !exec.tensor<[4], i32, @g1>
  // CHECK-NEXT: exec.yield %u
  exec.yield %u
}

// Another stream takes a value when it waits for it.
// CHECK-LABEL: exec.graph @streams {model = "m"}
exec.graph @streams {model = "m"} {
  // CHECK-NEXT: %kv = exec.kv_load {stream = "copy", tier = "disk"} -> !exec.tensor<[5, 2, 2, 2], int4, @g0>
  %kv = exec.kv_load {stream = "copy", tier = "disk"} -> !exec.tensor<[5, 2, 2, 2], int4, @g0>
  // CHECK-NEXT: %there = exec.wait %kv {stream = "comm"} -> !exec.tensor<[5, 2, 2, 2], int4, @g0>
  // GENERIC: %there = "exec.wait"(%kv) <{stream = "comm"}>
  %there = exec.wait %kv {stream = "comm"} -> !exec.tensor<[5, 2, 2, 2], int4, @g0>
  // CHECK-NEXT: %moved = exec.kv_migrate %there {stream = "comm"} -> !exec.tensor<[5, 2, 2, 2], int4, @g1>
  // GENERIC: %moved = "exec.kv_migrate"(%there) <{stream = "comm"}>
  %moved = exec.kv_migrate %there {stream = "comm"} -> !exec.tensor<[5, 2, 2, 2], int4, @g1>
  exec.yield %moved
}

// Micro-batches: rows that go their own ways.
// CHECK-LABEL: exec.graph @micro_batches {model = "m"}
exec.graph @micro_batches {model = "m"} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  // CHECK: %a = exec.slice %t -> !exec.tensor<[3], i32, @g0>
  // GENERIC: %a = "exec.slice"(%t)
  %a = exec.slice %t -> !exec.tensor<[3], i32, @g0>
  // CHECK-NEXT: %b = exec.slice %t {first = 3} -> !exec.tensor<[1], i32, @g0>
  %b = exec.slice %t {first = 3} -> !exec.tensor<[1], i32, @g0>
  // CHECK-NEXT: %c = exec.concat %a, %b -> !exec.tensor<[4], i32, @g0> attributes {note = "kept"}
  // GENERIC: %c = "exec.concat"(%a, %b) {note = "kept"}
  %c = exec.concat %a, %b -> !exec.tensor<[4], i32, @g0> attributes {note = "kept"}
  exec.yield %c
}
