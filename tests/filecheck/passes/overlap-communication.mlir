// RUN: sagec opt -p "overlap-communication" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "overlap-communication,overlap-communication" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "overlap-communication{micro_batches=2}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix=HALVES
// RUN: not sagec opt -p "overlap-communication{micro_batches=3}" %s 2>&1 | filecheck %s --check-prefix=THREE
// THREE: error: overlap-communication: micro_batches=3; 1 or 2

cluster.device @g0 {flops_per_s = 1.0e12, bytes_per_s = 1.0e9}
cluster.device @g1 like @g0
cluster.link @g0 to @g1 {bytes_per_s = 1.0e9, latency_us = 0.01}

// KV is stored while the sum is on its way; the sum is waited for where it is used.
// CHECK-LABEL: exec.graph @store_beside_the_sum
// CHECK: %p = exec.projection
// CHECK-NEXT: %[[P:[a-z0-9_]+]] = exec.wait %p {stream = "comm", layer = 0}
// CHECK-NEXT: %s = exec.all_reduce %[[P]] {stream = "comm", layer = 0, time_us = 9.0} over [@g0, @g1]
// CHECK-NEXT: exec.kv_store %k
// CHECK-NEXT: %[[S:[a-z0-9_]+]] = exec.wait %s {stream = "compute", layer = 0}
// CHECK-NEXT: exec.norm %h, %[[S]]
exec.graph @store_beside_the_sum {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[1, 8], f32, @g0>
  %q = exec.qkv %h {layer = 0, heads = 1, kv_heads = 1, head_dim = 4} -> !exec.tensor<[1, 12], f32, @g0>
  %c = exec.kv_load {layer = 0} -> !exec.tensor<[3, 2, 1, 4], f32, @g0>
  %a, %k = exec.decode_attention %q, %c {layer = 0, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} context #pd.column<3> -> !exec.tensor<[1, 4], f32, @g0>, !exec.tensor<[1, 2, 1, 4], f32, @g0>
  exec.kv_store %k {layer = 0, time_us = 3.0}
  %p = exec.projection %a {layer = 0, time_us = 2.0} -> !exec.tensor<[1, 8], f32, @g0>
  %s = exec.all_reduce %p {layer = 0, time_us = 9.0} over [@g0, @g1] -> !exec.tensor<[1, 8], f32, @g0>
  %n, %m = exec.norm %h, %s {layer = 0, time_us = 1.0} -> !exec.tensor<[1, 8], f32, @g0>, !exec.tensor<[1, 8], f32, @g0>
  exec.yield %n
}

// Two lanes that stand one after the other take turns: while the first one's sum is on its way, the
// second one computes. That takes 40 us, where the text takes 60.
// CHECK-LABEL: exec.graph @lanes_take_turns
// CHECK: %a = exec.ffn %h
// CHECK-NEXT: %[[A:[a-z0-9_]+]] = exec.wait %a {stream = "comm"}
// CHECK-NEXT: %sa = exec.all_reduce %[[A]]
// CHECK-NEXT: %b = exec.ffn %i
// CHECK-NEXT: %[[B:[a-z0-9_]+]] = exec.wait %b {stream = "comm"}
// CHECK-NEXT: %sb = exec.all_reduce %[[B]]
// CHECK-NEXT: %[[SA:[a-z0-9_]+]] = exec.wait %sa {stream = "compute"}
// CHECK-NEXT: %c = exec.ffn %[[SA]]
// CHECK-NEXT: %[[SB:[a-z0-9_]+]] = exec.wait %sb {stream = "compute"}
// CHECK-NEXT: %d = exec.ffn %[[SB]]
// CHECK-NEXT: exec.yield %c, %d
exec.graph @lanes_take_turns {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[1, 8], f32, @g0>
  %i = exec.embedding %t -> !exec.tensor<[1, 8], f32, @g0>
  %a = exec.ffn %h {time_us = 10.0, width = 8} -> !exec.tensor<[1, 8], f32, @g0>
  %sa = exec.all_reduce %a {time_us = 10.0} over [@g0, @g1] -> !exec.tensor<[1, 8], f32, @g0>
  %c = exec.ffn %sa {time_us = 10.0, width = 8} -> !exec.tensor<[1, 8], f32, @g0>
  %b = exec.ffn %i {time_us = 10.0, width = 8} -> !exec.tensor<[1, 8], f32, @g0>
  %sb = exec.all_reduce %b {time_us = 10.0} over [@g0, @g1] -> !exec.tensor<[1, 8], f32, @g0>
  %d = exec.ffn %sb {time_us = 10.0, width = 8} -> !exec.tensor<[1, 8], f32, @g0>
  exec.yield %c, %d
}

// A message to the next stage goes on its way while this one goes on.
// CHECK-LABEL: exec.graph @stages
// CHECK: %[[H:[a-z0-9_]+]] = exec.wait %h {stream = "comm"} -> !exec.tensor<[1, 8], f32, @g0>
// CHECK-NEXT: exec.send %[[H]] {stream = "comm", time_us = 10.0, channel = 0} to @g1
// CHECK-NEXT: %there = exec.recv {stream = "comm", channel = 0} from @g0
// CHECK-NEXT: %f = exec.ffn %h
// CHECK-NEXT: %[[T:[a-z0-9_]+]] = exec.wait %there {stream = "compute"} -> !exec.tensor<[1, 8], f32, @g1>
// CHECK-NEXT: exec.ffn %[[T]]
exec.graph @stages {model = "m", pp = 2} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[1, 8], f32, @g0>
  exec.send %h {channel = 0, time_us = 10.0} to @g1
  %f = exec.ffn %h {width = 8, time_us = 5.0} -> !exec.tensor<[1, 8], f32, @g0>
  %there = exec.recv {channel = 0} from @g0 -> !exec.tensor<[1, 8], f32, @g1>
  %g = exec.ffn %there {width = 8, time_us = 5.0} -> !exec.tensor<[1, 8], f32, @g1>
  exec.yield %f, %g
}

// Nothing to move: what is on its stream already, somebody put there, in an order of his own.
// CHECK-LABEL: exec.graph @nothing_to_move
// CHECK: %a = exec.wait %h {stream = "comm"}
// CHECK-NEXT: %f = exec.ffn %h
// CHECK-NEXT: %s = exec.all_reduce %a {stream = "comm"}
exec.graph @nothing_to_move {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[1, 8], f32, @g0>
  %a = exec.wait %h {stream = "comm"} -> !exec.tensor<[1, 8], f32, @g0>
  %f = exec.ffn %h {width = 8} -> !exec.tensor<[1, 8], f32, @g0>
  %s = exec.all_reduce %a {stream = "comm"} over [@g0, @g1] -> !exec.tensor<[1, 8], f32, @g0>
  exec.yield %f, %s
}

// Behind a long message that is on the stream already, the short one would come late: the step would
// take 201 us for 111, and the graph stays as it is.
// CHECK-LABEL: exec.graph @would_be_longer
// CHECK: exec.all_reduce %a {stream = "comm", time_us = 100.0}
// CHECK: exec.all_reduce %f {time_us = 1.0}
exec.graph @would_be_longer {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[1, 8], f32, @g0>
  %a = exec.wait %h {stream = "comm"} -> !exec.tensor<[1, 8], f32, @g0>
  %s = exec.all_reduce %a {stream = "comm", time_us = 100.0} over [@g0, @g1] -> !exec.tensor<[1, 8], f32, @g0>
  %f = exec.ffn %h {time_us = 10.0, width = 8} -> !exec.tensor<[1, 8], f32, @g0>
  %r = exec.all_reduce %f {time_us = 1.0} over [@g0, @g1] -> !exec.tensor<[1, 8], f32, @g0>
  %g = exec.ffn %r {time_us = 100.0, width = 8} -> !exec.tensor<[1, 8], f32, @g0>
  exec.yield %s, %g
}

// Ten rows of four requests, a prompt's [0, 4), another's [2, 6) and two decodes, cut behind the
// first request: nearer to the middle than behind the second. While the sum of the first half is on
// its way, the second half computes.
// HALVES-LABEL: exec.graph @halves
// HALVES-DAG: %[[H0:[a-z0-9_]+]] = exec.slice %h {{.*}}!exec.tensor<[4, 8]
// HALVES-DAG: %[[H1:[a-z0-9_]+]] = exec.slice %h {{.*}}first = 4{{.*}}!exec.tensor<[6, 8]
// HALVES-DAG: %{{.*}} = exec.prefill_attention %{{.*}} first = 0} begin #pd.column<0> end #pd.column<4>
// HALVES-DAG: %{{.*}} = exec.prefill_attention %{{.*}} first = 0} begin #pd.column<2> end #pd.column<6>
// HALVES-DAG: %{{.*}} = exec.decode_attention %{{.*}} first = 4} context #pd.column<3, 7>
// HALVES-DAG: exec.slice %c {layer = 0{{.*}}} -> !exec.tensor<[0, 2, 1, 4]
// HALVES-DAG: exec.all_reduce %{{.*}} {stream = "comm", layer = 0, time_us = {{.*}}} over [@g0, @g1] -> !exec.tensor<[4, 8]
// HALVES-DAG: exec.all_reduce %{{.*}} {stream = "comm", layer = 0, time_us = {{.*}}} over [@g0, @g1] -> !exec.tensor<[6, 8]
// HALVES: %[[W:[a-z0-9_]+]] = exec.concat %{{.*}}, %{{.*}} -> !exec.tensor<[10, 8], f32, @g0>
// HALVES-NEXT: exec.lm_head %[[W]]
exec.graph @halves {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[10], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[10, 8], f32, @g0>
  %q = exec.qkv %h {layer = 0, time_us = 100.0, flops = 9.8e7, heads = 1, kv_heads = 1, head_dim = 4} -> !exec.tensor<[10, 12], f32, @g0>
  %c = exec.kv_load {layer = 0} -> !exec.tensor<[2, 2, 1, 4], f32, @g0>
  %a, %k = exec.prefill_attention %q, %c {layer = 0, heads = 1, kv_heads = 1, head_dim = 4} begin #pd.column<0, 2> end #pd.column<4, 6> -> !exec.tensor<[8, 4], f32, @g0>, !exec.tensor<[8, 2, 1, 4], f32, @g0>
  %d = exec.kv_load {layer = 0} -> !exec.tensor<[10, 2, 1, 4], f32, @g0>
  %b, %l = exec.decode_attention %q, %d {layer = 0, heads = 1, kv_heads = 1, head_dim = 4, first = 8} context #pd.column<3, 7> -> !exec.tensor<[2, 4], f32, @g0>, !exec.tensor<[2, 2, 1, 4], f32, @g0>
  exec.kv_store %k {layer = 0}
  exec.kv_store %l {layer = 0}
  %p = exec.projection %a, %b {layer = 0, time_us = 10.0, flops = 8.0e6} -> !exec.tensor<[10, 8], f32, @g0>
  %s = exec.all_reduce %p {layer = 0, time_us = 66.0} over [@g0, @g1] -> !exec.tensor<[10, 8], f32, @g0>
  %n, %m = exec.norm %h, %s {layer = 0} -> !exec.tensor<[10, 8], f32, @g0>, !exec.tensor<[10, 8], f32, @g0>
  %g = exec.lm_head %n rows #pd.column<3, 7, 8, 9> -> !exec.tensor<[4, 4], f32, @g0>
  exec.yield %g
}

// The same with many weights, which each half reads once more: that takes longer than it hides.
// HALVES-LABEL: exec.graph @weights_weigh_more
// HALVES-NOT: exec.slice
// HALVES: exec.all_reduce %{{.*}} {stream = "comm"
exec.graph @weights_weigh_more {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[10], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[10, 8], f32, @g0>
  %f = exec.ffn %h {layer = 0, time_us = 100.0, bytes = 98000.0, width = 8} -> !exec.tensor<[10, 8], f32, @g0>
  %s = exec.all_reduce %f {layer = 0, time_us = 66.0} over [@g0, @g1] -> !exec.tensor<[10, 8], f32, @g0>
  %n, %m = exec.norm %h, %s {layer = 0} -> !exec.tensor<[10, 8], f32, @g0>, !exec.tensor<[10, 8], f32, @g0>
  exec.yield %n
}

// -----

// Only to cut rows one must know what half of an op takes.
// CHECK-LABEL: exec.graph @unknown_device
// CHECK: exec.all_reduce %{{.*}} {stream = "comm"
// HALVES: error: no cluster.device @g0
// HALVES: there are: none
exec.graph @unknown_device {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[2, 8], f32, @g0>
  %f = exec.ffn %h {time_us = 100.0, width = 8} -> !exec.tensor<[2, 8], f32, @g0>
  %s = exec.all_reduce %f {time_us = 66.0} over [@g0, @g1] -> !exec.tensor<[2, 8], f32, @g0>
  exec.yield %s
}
