// RUN: sagec opt -p "fuse-communication" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "fuse-communication,fuse-communication" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "fuse-communication{bytes=128}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix=SMALL
// RUN: not sagec opt -p "fuse-communication{bytes=0}" %s 2>&1 | filecheck %s --check-prefix=ZERO
// ZERO: error: fuse-communication: bytes=0; 1 or more

cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1 {bytes_per_s = 1.0e9, latency_us = 10.0}

// The sums of two lanes go as one message. Apart, each of them takes two hops of 10 us and of half
// of its bytes at 1 kB/us, 20.128 us; together 20.256 us. It goes where the first stood, for nothing
// between the two makes what the second takes.
// CHECK-LABEL: exec.graph @two_lanes
// CHECK: %b = exec.ffn
// CHECK-NEXT: %sa, %sb = exec.all_reduce %a, %b {layer = 3, time_us = 20.256, bytes = 256.0} over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>, !exec.tensor<[4, 8], f32, @g0>
// CHECK-NEXT: exec.norm %h, %sa
// CHECK-NEXT: exec.norm %h, %sb

// Fused, they have 256 bytes; bytes=128 keeps them apart.
// SMALL-LABEL: exec.graph @two_lanes
// SMALL: %sa = exec.all_reduce %a
// SMALL: %sb = exec.all_reduce %b
exec.graph @two_lanes {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[4, 8], f32, @g0>
  %a = exec.ffn %h {time_us = 5.0, width = 8} -> !exec.tensor<[4, 8], f32, @g0>
  %b = exec.ffn %h {time_us = 5.0, width = 8} -> !exec.tensor<[4, 8], f32, @g0>
  %sa = exec.all_reduce %a {layer = 3, time_us = 20.128, bytes = 128.0} over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  %sb = exec.all_reduce %b {layer = 3, time_us = 20.128, bytes = 128.0} over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  %na, %ha = exec.norm %h, %sa -> !exec.tensor<[4, 8], f32, @g0>, !exec.tensor<[4, 8], f32, @g0>
  %nb, %hb = exec.norm %h, %sb -> !exec.tensor<[4, 8], f32, @g0>, !exec.tensor<[4, 8], f32, @g0>
  exec.yield %na, %nb
}

// What the second takes is made between the two, by an op that needs nothing of the first: the
// first goes down to the second.
// CHECK-LABEL: exec.graph @moves_down
// CHECK: %a = exec.ffn
// CHECK-NEXT: %b = exec.ffn
// CHECK-NEXT: %sa, %sb = exec.all_reduce %a, %b
exec.graph @moves_down {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[4, 8], f32, @g0>
  %a = exec.ffn %h {width = 8} -> !exec.tensor<[4, 8], f32, @g0>
  %sa = exec.all_reduce %a over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  %b = exec.ffn %h {width = 8} -> !exec.tensor<[4, 8], f32, @g0>
  %sb = exec.all_reduce %b over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  exec.yield %sa, %sb
}

// Three become one, and their logits too.
// CHECK-LABEL: exec.graph @three
// CHECK: exec.all_gather %a, %b, %a {axis = 1} over [@g0, @g1]
// CHECK-NEXT: exec.yield
exec.graph @three {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %a = exec.embedding %t -> !exec.tensor<[4, 2], f32, @g0>
  %b = exec.embedding %t -> !exec.tensor<[4, 2], f32, @g0>
  %x = exec.all_gather %a {axis = 1} over [@g0, @g1] -> !exec.tensor<[4, 4], f32, @g0>
  %y = exec.all_gather %b {axis = 1} over [@g0, @g1] -> !exec.tensor<[4, 4], f32, @g0>
  %z = exec.all_gather %a {axis = 1} over [@g0, @g1] -> !exec.tensor<[4, 4], f32, @g0>
  exec.yield %x, %y, %z
}

// The second needs the first, so they stay two.
// CHECK-LABEL: exec.graph @one_after_the_other
// CHECK: %s = exec.all_reduce %h over
// CHECK-NEXT: %f = exec.ffn %s
// CHECK-NEXT: %r = exec.all_reduce %f over
exec.graph @one_after_the_other {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[4, 8], f32, @g0>
  %s = exec.all_reduce %h over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  %f = exec.ffn %s {width = 8} -> !exec.tensor<[4, 8], f32, @g0>
  %r = exec.all_reduce %f over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  exec.yield %r
}

// Between the two one op uses the first, and another makes what the second takes: neither can go to
// the other's place.
// CHECK-LABEL: exec.graph @not_adjacent
// CHECK: exec.all_reduce %h over
// CHECK: exec.all_reduce %b over
exec.graph @not_adjacent {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[4, 8], f32, @g0>
  %s = exec.all_reduce %h over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  %a = exec.ffn %s {width = 8} -> !exec.tensor<[4, 8], f32, @g0>
  %b = exec.ffn %h {width = 8} -> !exec.tensor<[4, 8], f32, @g0>
  %r = exec.all_reduce %b over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  exec.yield %a, %r
}

// Other kinds, types and streams do not go together.
// CHECK-LABEL: exec.graph @unlike
// CHECK-COUNT-4: exec.all_{{reduce|gather}} %{{[a-z]+}} {{.*}}over
exec.graph @unlike {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[4, 8], f32, @g0>
  %i = exec.embedding %t -> !exec.tensor<[4, 8], bf16, @g0>
  %w = exec.wait %h {stream = "comm"} -> !exec.tensor<[4, 8], f32, @g0>
  %a = exec.all_reduce %h {layer = 0} over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  %b = exec.all_reduce %i {layer = 0} over [@g0, @g1] -> !exec.tensor<[4, 8], bf16, @g0>
  %c = exec.all_reduce %w {stream = "comm"} over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  %d = exec.all_gather %h {axis = 1} over [@g0, @g1] -> !exec.tensor<[4, 16], f32, @g0>
  exec.yield %a, %b, %c, %d
}

// The first message runs beside the second lane's arithmetic; fused, it would wait for it, and the
// step would take 20 us longer.
// CHECK-LABEL: exec.graph @runs_beside
// CHECK: exec.all_reduce %wa {stream = "comm", time_us = 20.128}
// CHECK: exec.all_reduce %wb {stream = "comm", time_us = 20.128}
exec.graph @runs_beside {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[4, 8], f32, @g0>
  %wa = exec.wait %h {stream = "comm"} -> !exec.tensor<[4, 8], f32, @g0>
  %sa = exec.all_reduce %wa {stream = "comm", time_us = 20.128} over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  %b = exec.ffn %h {time_us = 100.0, width = 8} -> !exec.tensor<[4, 8], f32, @g0>
  %wb = exec.wait %b {stream = "comm"} -> !exec.tensor<[4, 8], f32, @g0>
  %sb = exec.all_reduce %wb {stream = "comm", time_us = 20.128} over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  %x = exec.wait %sa -> !exec.tensor<[4, 8], f32, @g0>
  %c = exec.ffn %x {time_us = 60.0, width = 8} -> !exec.tensor<[4, 8], f32, @g0>
  exec.yield %c, %sb
}

// -----

// Where no link carries the message, nobody knows whether it pays.
// CHECK: error: exec.all_reduce: no link leads from @g0 to @g1
exec.graph @no_link {model = "m", tp = 2} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[4, 8], f32, @g0>
  %a = exec.all_reduce %h over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  %b = exec.all_reduce %h over [@g0, @g1] -> !exec.tensor<[4, 8], f32, @g0>
  exec.yield %a, %b
}
