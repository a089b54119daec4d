// RUN: sagec opt -p "assign-kv" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "assign-kv,assign-kv" --split-input-file --verify-diagnostics %s | filecheck %s

// Every row has the blocks of its prompt and of what it decodes within the horizon: 16 tokens a
// block; "a" needs 33 + 8, "r" 30 + 2.
// CHECK-LABEL: pd.graph @horizon
// CHECK: kv.reserve on @i0 [
// CHECK-NEXT: "a": blocks 3,
// CHECK-NEXT: "r": blocks 2
// CHECK-NEXT: ]
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 40}
pd.graph @horizon {horizon = 8} {
  %old = pd.resident on @i0 ["r": context 30 remaining 2]
  %new = pd.requests ["a": prompt 33 generate 100]
  %kv = pd.prefill %new on @i0
  %all = pd.join %old, %kv
  %end = pd.decode %all on @i0
}

// -----

// With prefill and decode apart, a row needs its prompt on one side and all on the other.
// CHECK-LABEL: pd.graph @apart
// CHECK: kv.reserve on @p0 [
// CHECK-NEXT: "a": blocks 2
// CHECK: kv.reserve on @d0 [
// CHECK-NEXT: "a": blocks 3
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g0] engine "sim" role decode model @m {kv_blocks = 40}
pd.graph @apart {
  %new = pd.requests ["a": prompt 32 generate 10]
  %kv = pd.prefill %new on @p0
  %moved = pd.transfer %kv source @p0 target @d0 ["a"]
  %end = pd.decode %moved on @d0
}

// -----

// Residents whose growth does not fit: the last of them is preempted, with the numbers.
// CHECK-LABEL: pd.graph @too_full
// CHECK: %kept = pd.preempt %old [
// CHECK-NEXT: "c": preempt on @i0 because "KV: 6 blocks needed, 4 there"
// CHECK-NEXT: ] : !pd.kv<3>
// CHECK-NEXT: pd.decode %kept on @i0 : !pd.kv<2>
// CHECK: kv.reserve on @i0 [
// CHECK-NEXT: "a": blocks 2,
// CHECK-NEXT: "b": blocks 2
// CHECK-NEXT: ]
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 4}
pd.graph @too_full {horizon = 4} {
  %old = pd.resident on @i0 ["a": context 16, "b": context 16, "c": context 16]
  %end = pd.decode %old on @i0
}

// -----

// A request that no empty instance could hold is refused, with what is missing.
// CHECK: error: "long" needs 7 KV blocks for 110 tokens, and @i0 has 4 of 16 tokens: 3 too few
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 4}
pd.graph @never {
  %new = pd.requests ["short": prompt 3 generate 2, "long": prompt 100 generate 10]
  %kv = pd.prefill %new on @i0
  %end = pd.decode %kv on @i0
}

// -----

// CHECK: error: pd.prefill has no place
// CHECK: run select-device first, or say `on`
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 4}
pd.graph @nowhere {
  %new = pd.requests ["short": prompt 3 generate 2]
  %kv = pd.prefill %new
}
