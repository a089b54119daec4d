// RUN: sagec opt -p "insert-transfers" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "insert-transfers,insert-transfers" --split-input-file --verify-diagnostics %s | filecheck %s

// KV moves to where it is decoded. A token of KV is 512 bytes here: 1000 of them take 10 us of
// latency and 512 us at 1 GB/s; the second waits for the first, and what is there does not move.
// CHECK-LABEL: pd.graph @moves
// CHECK: %moved = pd.transfer %all source @p0 target @d0 [
// CHECK-NEXT: "a": bytes 512000 us 522 via "g0-g1",
// CHECK-NEXT: "b": bytes 51200 us 573 via "g0-g1"
// CHECK-NEXT: ] : !pd.kv<3>
// CHECK-NEXT: pd.decode %moved on @d0

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1
cluster.link @g0 to @g1 {bytes_per_s = 1.0e9}
cluster.instance @p0 on [@g0] engine "sim" role prefill model @tiny {kv_blocks = 4000}
cluster.instance @d0 on [@g1] engine "sim" role decode model @tiny {kv_blocks = 4000}
pd.graph @moves {
  %old = pd.resident on @d0 ["r": context 100 remaining 5]
  %new = pd.requests ["a": prompt 1000 generate 5, "b": prompt 100 generate 5]
  %kv = pd.prefill %new on @p0
  %all = pd.join %old, %kv
  %end = pd.decode %all on @d0
  pd.yield %end
}

// Where a request is prefilled and decoded on the same instance, and where no place is known yet,
// nothing moves.
// CHECK-LABEL: pd.graph @stays
// CHECK-NOT: pd.transfer
// CHECK-LABEL: pd.graph @unplaced
// CHECK-NOT: pd.transfer
pd.graph @stays {
  %new = pd.requests ["a": prompt 1000 generate 5]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @p0
  pd.yield %end
}
pd.graph @unplaced {
  %new = pd.requests ["a": prompt 1000 generate 5]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// Into a phase of decodes, the transfer goes with them.
// CHECK-LABEL: pd.graph @in_a_phase
// CHECK: pd.phase decode
// CHECK-NEXT: %moved = pd.transfer %kv source @p0 target @d0
pd.graph @in_a_phase {
  %new = pd.requests ["a": prompt 1000 generate 5]
  %kv = pd.prefill %new on @p0
  %end = pd.phase decode {
    %0 = pd.decode %kv on @d0
    pd.yield %0
  } : !pd.kv<1>
  pd.yield %end
}

// -----

// The cheapest path, though it has more links; rows to several instances; a link that two share.
// CHECK-LABEL: pd.graph @paths
// CHECK: pd.transfer %kv source @p0 [
// CHECK-NEXT: "a": target @d0 bytes 512000 us 532 via "g0-hub-g1",
// CHECK-NEXT: "b": target @d1 bytes 512000 us 1044 via "g0-hub-g2"

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1
cluster.device @g2
cluster.switch @hub
cluster.link @g0 to @g1 {bytes_per_s = 1.0e6}
cluster.link @g0 to @hub {bytes_per_s = 1.0e9}
cluster.link @hub to @g1 {bytes_per_s = 1.0e10}
cluster.link @hub to @g2 {bytes_per_s = 1.0e10}
cluster.instance @p0 on [@g0] engine "sim" role prefill model @tiny {kv_blocks = 4000}
cluster.instance @d0 on [@g1] engine "sim" role decode model @tiny {kv_blocks = 4000}
cluster.instance @d1 on [@g2] engine "sim" role decode model @tiny {kv_blocks = 4000}
pd.graph @paths {
  %new = pd.requests ["a": prompt 1000 generate 5, "b": prompt 1000 generate 5]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on [@d0, @d1]
  pd.yield %end
}

// -----

// Two instances on one device: KV is copied in its memory, read and written once each.
// CHECK-LABEL: pd.graph @one_device
// CHECK: "a": bytes 512000 us 102 via "g0"

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0 {bytes_per_s = 1.0e10}
cluster.instance @p0 on [@g0] engine "sim" role prefill model @tiny {kv_blocks = 4000}
cluster.instance @d0 on [@g0] engine "sim" role decode model @tiny {kv_blocks = 4000}
pd.graph @one_device {
  %new = pd.requests ["a": prompt 1000 generate 5]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// CHECK: error: "a": its KV is on @p0 and it decodes on @d0, which no links connect
// CHECK: declare a cluster.link

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1
cluster.instance @p0 on [@g0] engine "sim" role prefill model @tiny {kv_blocks = 4000}
cluster.instance @d0 on [@g1] engine "sim" role decode model @tiny {kv_blocks = 4000}
pd.graph @no_path {
  %new = pd.requests ["a": prompt 1000 generate 5]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// CHECK: error: no instance @d9
// CHECK: there are: @p0, @d0

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @tiny {kv_blocks = 4000}
cluster.instance @d0 on [@g0] engine "sim" role decode model @tiny {kv_blocks = 4000}
pd.graph @no_instance {
  %new = pd.requests ["a": prompt 1000 generate 5]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d9
  pd.yield %end
}

// -----

// What the cluster names must be there.
// CHECK: error: link: no device or switch @g7 in the module
// CHECK: error: instance @p0: no model @large in the module
// CHECK: error: instance @p0: no device @g7 in the module
// CHECK: error: cluster.device @g0 is like @g7, which is none

cluster.device @g0
cluster.link @g0 to @g7
pd.graph @no_end {}

// -----

cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @large {kv_blocks = 4000}
pd.graph @no_model {}

// -----

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.instance @p0 on [@g7] engine "sim" role prefill model @tiny {kv_blocks = 4000}
pd.graph @no_device {}

// -----

cluster.device @g0 like @g7
pd.graph @like_none {}
