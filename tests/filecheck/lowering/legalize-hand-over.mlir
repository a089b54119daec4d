// RUN: sagec opt -p "insert-transfers,chunk-prefill,assign-kv,fuse-steps,legalize" --split-input-file --verify-diagnostics %s | filecheck %s

// What both ends of a hand-over must agree on; elsewhere it is found out at run time.

// A pair that agrees on everything.
// CHECK: pd.steps @p0
// CHECK: pd.steps @d0

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1
cluster.instance @p0 on [@g0] engine "torch" role prefill model @m {kv_blocks = 400}
cluster.instance @d0 on [@g1] engine "torch" role decode model @m {kv_blocks = 400}
pd.graph @legal {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// Different tp, where the engine does not re-shard KV.
// CHECK: error: hand-over @p0 to @d0: tp 2 and 1 differ, and vllm does not re-shard KV

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.link @g0 to @g1
cluster.link @g0 to @g2
cluster.instance @p0 on [@g0, @g1] engine "vllm" role prefill model @m {kv_blocks = 400, tp = 2}
cluster.instance @d0 on [@g2] engine "vllm" role decode model @m {kv_blocks = 400}
pd.graph @tp_differs {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// Where it does, different tp is legal.
// CHECK: pd.steps @p0
// CHECK: pd.steps @d0

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.link @g0 to @g1
cluster.link @g0 to @g2
cluster.instance @p0 on [@g0, @g1] engine "sim" role prefill model @m {kv_blocks = 400, tp = 2}
cluster.instance @d0 on [@g2] engine "sim" role decode model @m {kv_blocks = 400}
pd.graph @resharded {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// But never with more ranks than KV heads, for their replicas do not re-shard.
// CHECK: error: hand-over @p0 to @d0: tp 4 of @d0 is more than 2 KV heads, which are then replicated and do not re-shard
// CHECK: at most 2

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.device @g3 like @g0
cluster.device @g4 like @g0
cluster.device @g5 like @g0
cluster.link @g0 to @g1
cluster.link @g0 to @g2
cluster.link @g0 to @g3
cluster.link @g0 to @g4
cluster.link @g0 to @g5
cluster.instance @p0 on [@g0, @g1] engine "sim" role prefill model @m {kv_blocks = 400, tp = 2}
cluster.instance @d0 on [@g2, @g3, @g4, @g5] engine "sim" role decode model @m {kv_blocks = 400, tp = 4}
pd.graph @replicated_kv_heads {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// Blocks of different sizes.
// CHECK: error: hand-over @p0 to @d0: block_tokens 16 and 32 differ
// CHECK: make them the same

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1
cluster.instance @p0 on [@g0] engine "torch" role prefill model @m {kv_blocks = 400}
cluster.instance @d0 on [@g1] engine "torch" role decode model @m {kv_blocks = 400, block_tokens = 32}
pd.graph @block_sizes {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// A draft model whose layers lie beside the model's on one side only.
// CHECK: error: hand-over @p0 to @d0: draft_layers 0 and 1 differ (KV of a draft model on one side only)
// CHECK: make them the same

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1
cluster.instance @p0 on [@g0] engine "vllm" role prefill model @m {kv_blocks = 400}
cluster.instance @d0 on [@g1] engine "vllm" role decode model @m {kv_blocks = 400, draft_layers = 1}
pd.graph @draft_on_one_side {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// KV in different types.
// CHECK: error: hand-over @p0 to @d0: kv_dtype bf16 and fp8 differ
// CHECK: make them the same

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1
cluster.instance @p0 on [@g0] engine "vllm" role prefill model @m {kv_blocks = 400}
cluster.instance @d0 on [@g1] engine "vllm" role decode model @m {kv_blocks = 400, kv_dtype = "fp8"}
pd.graph @kv_types {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// The model's own type is the same, said or not.
// CHECK: pd.steps @p0

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1
cluster.instance @p0 on [@g0] engine "vllm" role prefill model @m {kv_blocks = 400, kv_dtype = "bf16"}
cluster.instance @d0 on [@g1] engine "vllm" role decode model @m {kv_blocks = 400}
pd.graph @same_kv_type {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// KV in a different order.
// CHECK: error: hand-over @p0 to @d0: kv_layout heads-first and default differ
// CHECK: make them the same

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1
cluster.instance @p0 on [@g0] engine "vllm" role prefill model @m {kv_blocks = 400, kv_layout = "heads-first"}
cluster.instance @d0 on [@g1] engine "vllm" role decode model @m {kv_blocks = 400}
pd.graph @kv_layouts {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// Different engines.
// CHECK: error: hand-over @p0 to @d0: engines vllm and torch differ
// CHECK: use one on both sides

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1
cluster.instance @p0 on [@g0] engine "vllm" role prefill model @m {kv_blocks = 400}
cluster.instance @d0 on [@g1] engine "torch" role decode model @m {kv_blocks = 400}
pd.graph @engines {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// Different models.
// CHECK: error: hand-over @p0 to @d0: models @m and @n differ
// CHECK: KV is of one model

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.model @n like @m
cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1
cluster.instance @p0 on [@g0] engine "torch" role prefill model @m {kv_blocks = 400}
cluster.instance @d0 on [@g1] engine "torch" role decode model @n {kv_blocks = 400}
pd.graph @models {
  %new = pd.requests ["a": prompt 80 generate 32 model @m]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}

// -----

// Several outputs of one prompt, while prefill and decode are apart.
// CHECK: error: "a" asks 4 outputs of one prompt, and prefill and decode are apart
// CHECK: 1, or let one instance do both phases

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1
cluster.instance @p0 on [@g0] engine "vllm" role prefill model @m {kv_blocks = 400}
cluster.instance @d0 on [@g1] engine "vllm" role decode model @m {kv_blocks = 400}
pd.graph @samples_apart {
  %new = pd.requests ["a": prompt 80 generate 32 samples 4]
  %kv = pd.prefill %new on @p0
  %end = pd.decode %kv on @d0
  pd.yield %end
}
