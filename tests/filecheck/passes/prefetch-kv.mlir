// RUN: sagec opt -p "prefetch-kv" %s | filecheck %s
// RUN: sagec opt -p "prefetch-kv,prefetch-kv" %s | filecheck %s
// RUN: sagec opt -p "prefetch-kv{depth=2}" %s | filecheck %s --check-prefix=TWO
// RUN: not sagec opt -p "prefetch-kv{depth=0}" %s 2>&1 | filecheck %s --check-prefix=ZERO
// ZERO: error: prefetch-kv: depth=0; 1 or more layers

// Each layer's KV comes from the host while the layer before computes: that of layer 0 while the
// tokens are embedded. Attention waits for it.
// CHECK-LABEL: exec.graph @from_the_host
// CHECK: %c0 = exec.kv_load {stream = "copy", layer = 0, time_us = 8.0, tier = "host"}
// CHECK-NEXT: exec.input
// CHECK-NEXT: exec.embedding
// CHECK-NEXT: %c1 = exec.kv_load {stream = "copy", layer = 1, time_us = 8.0, tier = "host"}
// CHECK-NEXT: exec.qkv {{.*}}layer = 0
// CHECK-NEXT: %[[C0:[a-z0-9_]+]] = exec.wait %c0 {stream = "compute", layer = 0}
// CHECK-NEXT: %{{.*}} = exec.decode_attention %q0, %[[C0]]
// CHECK-NEXT: exec.projection
// CHECK-NEXT: %c2 = exec.kv_load {stream = "copy", layer = 2
// CHECK-NEXT: %q1 = exec.qkv {{.*}}layer = 1
// CHECK-NEXT: %[[C1:[a-z0-9_]+]] = exec.wait %c1
// CHECK-NEXT: %{{.*}} = exec.decode_attention %q1, %[[C1]]
// CHECK: %q2 = exec.qkv
// CHECK-NEXT: %[[C2:[a-z0-9_]+]] = exec.wait %c2

// Two layers ahead at most: layer 1 at the begin too, layer 2 while layer 0 computes.
// TWO-LABEL: exec.graph @from_the_host
// TWO: %c0 = exec.kv_load
// TWO-NEXT: %c1 = exec.kv_load
// TWO-NEXT: exec.input
// TWO-NEXT: exec.embedding
// TWO-NEXT: %c2 = exec.kv_load
// TWO-NEXT: exec.qkv {{.*}}layer = 0
exec.graph @from_the_host {phase = "decode", model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[1, 8], f32, @g0>
  %q0 = exec.qkv %h {layer = 0, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} -> !exec.tensor<[1, 12], f32, @g0>
  %c0 = exec.kv_load {layer = 0, time_us = 8.0, tier = "host"} -> !exec.tensor<[3, 2, 1, 4], f32, @g0>
  %a0, %k0 = exec.decode_attention %q0, %c0 {layer = 0, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} context #pd.column<3> -> !exec.tensor<[1, 4], f32, @g0>, !exec.tensor<[1, 2, 1, 4], f32, @g0>
  %p0 = exec.projection %a0 {layer = 0} -> !exec.tensor<[1, 8], f32, @g0>
  %q1 = exec.qkv %p0 {layer = 1, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} -> !exec.tensor<[1, 12], f32, @g0>
  %c1 = exec.kv_load {layer = 1, time_us = 8.0, tier = "host"} -> !exec.tensor<[3, 2, 1, 4], f32, @g0>
  %a1, %k1 = exec.decode_attention %q1, %c1 {layer = 1, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} context #pd.column<3> -> !exec.tensor<[1, 4], f32, @g0>, !exec.tensor<[1, 2, 1, 4], f32, @g0>
  %p1 = exec.projection %a1 {layer = 1} -> !exec.tensor<[1, 8], f32, @g0>
  %q2 = exec.qkv %p1 {layer = 2, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} -> !exec.tensor<[1, 12], f32, @g0>
  %c2 = exec.kv_load {layer = 2, time_us = 8.0, tier = "host"} -> !exec.tensor<[3, 2, 1, 4], f32, @g0>
  %a2, %k2 = exec.decode_attention %q2, %c2 {layer = 2, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} context #pd.column<3> -> !exec.tensor<[1, 4], f32, @g0>, !exec.tensor<[1, 2, 1, 4], f32, @g0>
  exec.yield %a2
}

// What migrates goes with the load that it takes, on its own device; the other one waits for it.
// CHECK-LABEL: exec.graph @from_another_device
// CHECK: %far = exec.kv_load {stream = "copy", layer = 0} -> {{.*}}@g1
// CHECK-NEXT: %near = exec.kv_migrate %far {stream = "copy", layer = 0, time_us = 8.0} -> {{.*}}@g0
// CHECK-NEXT: exec.input
// CHECK: %[[NEAR:[a-z0-9_]+]] = exec.wait %near {stream = "compute", layer = 0}
// CHECK-NEXT: %{{.*}} = exec.decode_attention %q, %[[NEAR]]
exec.graph @from_another_device {phase = "decode", model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[1, 8], f32, @g0>
  %q = exec.qkv %h {layer = 0, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} -> !exec.tensor<[1, 12], f32, @g0>
  %far = exec.kv_load {layer = 0} -> !exec.tensor<[3, 2, 1, 4], f32, @g1>
  %near = exec.kv_migrate %far {layer = 0, time_us = 8.0} -> !exec.tensor<[3, 2, 1, 4], f32, @g0>
  %a, %k = exec.decode_attention %q, %near {layer = 0, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} context #pd.column<3> -> !exec.tensor<[1, 4], f32, @g0>, !exec.tensor<[1, 2, 1, 4], f32, @g0>
  exec.yield %a
}

// The layer before may be a stage before: its KV comes while that one computes.
// CHECK-LABEL: exec.graph @over_stages
// CHECK: exec.embedding
// CHECK-NEXT: %c = exec.kv_load {stream = "copy", layer = 1, {{.*}}@g1
// CHECK-NEXT: exec.ffn
exec.graph @over_stages {phase = "decode", model = "m", pp = 2} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[1, 8], f32, @g0>
  %f = exec.ffn %h {layer = 0, time_us = 5.0, width = 8} -> !exec.tensor<[1, 8], f32, @g0>
  exec.send %f {layer = 0, channel = 0} to @g1
  %r = exec.recv {layer = 1, channel = 0} from @g0 -> !exec.tensor<[1, 8], f32, @g1>
  %q = exec.qkv %r {layer = 1, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} -> !exec.tensor<[1, 12], f32, @g1>
  %c = exec.kv_load {layer = 1, time_us = 8.0, tier = "disk"} -> !exec.tensor<[3, 2, 1, 4], f32, @g1>
  %a, %k = exec.decode_attention %q, %c {layer = 1, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} context #pd.column<3> -> !exec.tensor<[1, 4], f32, @g1>, !exec.tensor<[1, 2, 1, 4], f32, @g1>
  exec.yield %a
}

// KV that migrates after it was computed here cannot come before it is there.
// CHECK-LABEL: exec.graph @new_kv
// CHECK: %a, %new = exec.decode_attention
// CHECK-NEXT: %[[NEW:[a-z0-9_]+]] = exec.wait %new {stream = "copy", layer = 0}
// CHECK-NEXT: %there = exec.kv_migrate %[[NEW]] {stream = "copy", layer = 0, time_us = 8.0}
// CHECK-NEXT: exec.ffn
// CHECK-NEXT: %[[THERE:[a-z0-9_]+]] = exec.wait %there {stream = "compute", layer = 0} -> {{.*}}@g1
// CHECK-NEXT: exec.kv_store %[[THERE]]
exec.graph @new_kv {phase = "decode", model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[1, 8], f32, @g0>
  %q = exec.qkv %h {layer = 0, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} -> !exec.tensor<[1, 12], f32, @g0>
  %c = exec.kv_load {layer = 0} -> !exec.tensor<[3, 2, 1, 4], f32, @g0>
  %a, %new = exec.decode_attention %q, %c {layer = 0, time_us = 5.0, heads = 1, kv_heads = 1, head_dim = 4} context #pd.column<3> -> !exec.tensor<[1, 4], f32, @g0>, !exec.tensor<[1, 2, 1, 4], f32, @g0>
  %there = exec.kv_migrate %new {layer = 0, time_us = 8.0} -> !exec.tensor<[1, 2, 1, 4], f32, @g1>
  %f = exec.ffn %h {layer = 0, time_us = 5.0, width = 8} -> !exec.tensor<[1, 8], f32, @g0>
  exec.kv_store %there {layer = 0}
  exec.yield %f, %a
}

// KV on the device is read where it lies.
// CHECK-LABEL: exec.graph @on_the_device
// CHECK: exec.qkv
// CHECK-NEXT: %c = exec.kv_load {layer = 0}
// CHECK-NEXT: exec.decode_attention %q, %c
// CHECK-NOT: exec.wait
exec.graph @on_the_device {phase = "decode", model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %h = exec.embedding %t -> !exec.tensor<[1, 8], f32, @g0>
  %q = exec.qkv %h {layer = 0, heads = 1, kv_heads = 1, head_dim = 4} -> !exec.tensor<[1, 12], f32, @g0>
  %c = exec.kv_load {layer = 0} -> !exec.tensor<[3, 2, 1, 4], f32, @g0>
  %a, %k = exec.decode_attention %q, %c {layer = 0, heads = 1, kv_heads = 1, head_dim = 4} context #pd.column<3> -> !exec.tensor<[1, 4], f32, @g0>, !exec.tensor<[1, 2, 1, 4], f32, @g0>
  exec.yield %a
}
