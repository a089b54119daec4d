// RUN: sagec opt -p "insert-transfers" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "insert-transfers,insert-transfers" --split-input-file --verify-diagnostics %s | filecheck %s

// Only rows that decode elsewhere move; 1 token of this model is 256 bytes of KV.
// CHECK-LABEL: pd.graph @elsewhere
// CHECK: %moved = pd.transfer %kv source @p0 target @d0 [
// CHECK-NEXT: "a": bytes 2560 us {{[0-9]+}} via "g0-g1"
// CHECK-NEXT: ] : !pd.kv<2>
// CHECK-NEXT: pd.decode %moved on [@d0, @p0] : !pd.kv<2>
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1
cluster.link @g0 to @g1 {bytes_per_s = 1.0e9, latency_us = 5.0}
cluster.instance @p0 on [@g0] engine "sim" role both model @m {kv_blocks = 40}
cluster.instance @d0 on [@g1] engine "sim" role decode model @m {kv_blocks = 40}
pd.graph @elsewhere {
  %new = pd.requests ["a": prompt 10, "b": prompt 10]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on [@d0, @p0]
  pd.yield %end
}

// -----

// The path of least time: over the fast switch, though it has one link more. Transfers over the
// same link wait for each other: the second arrives later than the first.
// CHECK-LABEL: pd.graph @cheapest_path
// CHECK: "a": bytes 2560000 us 2565 via "g0-s-g1",
// CHECK-NEXT: "b": bytes 2560000 us 5125 via "g0-s-g1"
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1
cluster.switch @s
cluster.link @g0 to @g1 {bytes_per_s = 1.0e6, latency_us = 1.0}
cluster.link @g0 to @s {bytes_per_s = 1.0e9, latency_us = 2.0}
cluster.link @s to @g1 {bytes_per_s = 1.0e9, latency_us = 3.0}
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 4000}
cluster.instance @d0 on [@g1] engine "sim" role decode model @m {kv_blocks = 4000}
pd.graph @cheapest_path {
  %new = pd.requests ["a": prompt 10000, "b": prompt 10000]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
}

// -----

// Two instances on one device move KV through its memory: no link is needed.
// CHECK-LABEL: pd.graph @same_device
// CHECK: "a": bytes 2560 via "g0"
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g0] engine "sim" role decode model @m {kv_blocks = 40}
pd.graph @same_device {
  %new = pd.requests ["a": prompt 10]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
}

// -----

// CHECK: error: "a": its KV is on @p0 and it decodes on @d0, which no links connect
// CHECK: declare a cluster.link
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g1] engine "sim" role decode model @m {kv_blocks = 40}
pd.graph @no_path {
  %new = pd.requests ["a": prompt 10]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
}

// -----

// CHECK: error: no instance @d9
// CHECK: there are: @p0
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 40}
pd.graph @no_instance {
  %new = pd.requests ["a": prompt 10]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d9
}
