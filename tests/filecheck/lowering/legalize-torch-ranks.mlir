// RUN: sagec opt -p "insert-transfers,chunk-prefill,assign-kv,fuse-steps,legalize" --split-input-file --verify-diagnostics %s | filecheck %s

// What the torch engine shares out over tensor parallel ranks.

// Two ranks with two heads each, whatever the vocabulary.
// CHECK: pd.graph @two_ranks
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 257}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.device @g3 like @g0
cluster.link @g0 to @g2
cluster.instance @x on [@g0, @g1] engine "torch" role both model @m {tp = 2, kv_blocks = 400}
pd.graph @two_ranks {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @x
  %end = pd.decode %kv on @x
  pd.yield %end
}

// -----

// A rank has whole KV heads.
// CHECK: error: instance @x: tp 4 is more than 2 KV heads, which torch does not replicate
// CHECK: at most 2

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 257}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.device @g3 like @g0
cluster.link @g0 to @g2
cluster.instance @x on [@g0, @g1, @g2, @g3] engine "torch" role both model @m {tp = 4, kv_blocks = 400}
pd.graph @too_few_kv_heads {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @x
  %end = pd.decode %kv on @x
  pd.yield %end
}

// -----

// The hidden layer is shared out evenly.
// CHECK: error: instance @x: 126 columns of the hidden layer do not split over tp 4
// CHECK: what does: 1, 2

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 4, head_dim = 32, ffn = 126, vocab = 257}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.device @g3 like @g0
cluster.link @g0 to @g2
cluster.instance @x on [@g0, @g1, @g2, @g3] engine "torch" role both model @m {tp = 4, kv_blocks = 400}
pd.graph @uneven_ffn {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @x
  %end = pd.decode %kv on @x
  pd.yield %end
}

// -----

// So are experts, each of which is whole on its rank.
// CHECK: error: instance @x: 6 experts do not split over tp 4
// CHECK: what does: 1, 2, 3

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 4, head_dim = 32, ffn = 126, vocab = 257, experts = 6, experts_per_token = 2}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.device @g3 like @g0
cluster.link @g0 to @g2
cluster.instance @x on [@g0, @g1, @g2, @g3] engine "torch" role both model @m {tp = 4, kv_blocks = 400}
pd.graph @uneven_experts {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @x
  %end = pd.decode %kv on @x
  pd.yield %end
}

// -----

// Ranks compute on CPUs.
// CHECK: error: instance @x: tp 2 on h200
// CHECK: torch shares a model out over kind cpu alone

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 257}
cluster.device @g0 {kind = "h200"}
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.device @g3 like @g0
cluster.link @g0 to @g2
cluster.instance @x on [@g0, @g1] engine "torch" role both model @m {tp = 2, kv_blocks = 400}
pd.graph @on_gpus {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @x
  %end = pd.decode %kv on @x
  pd.yield %end
}

// -----

// KV goes from one rank to two: it travels with the heads of all.
// CHECK: pd.graph @one_to_two
// CHECK: pd.steps @p0
// CHECK: pd.steps @d0

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 257}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.device @g3 like @g0
cluster.link @g0 to @g2
cluster.instance @p0 on [@g0] engine "torch" role prefill model @m {kv_blocks = 400}
cluster.instance @d0 on [@g2, @g3] engine "torch" role decode model @m {tp = 2, kv_blocks = 400}
pd.graph @one_to_two {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}
