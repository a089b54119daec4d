// RUN: sagec opt -p "serve" --split-input-file --verify-diagnostics %s | filecheck %s

// What engines can do passes unchanged; after that, what each of them would refuse or die of.
// CHECK-LABEL: pd.graph @legal
// CHECK: pd.steps @i0
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "torch" role both model @m {kv_blocks = 40}
pd.graph @legal {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK: error: instance @i0: no target 'toruch'
// CHECK: there are: echo, sim, torch, turbomind, vllm
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "toruch" role both model @m {kv_blocks = 40}
pd.graph @unknown_engine {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// FP8 KV where the engine does not compute on it.
// CHECK: error: instance @i0: kv_dtype fp8
// CHECK: torch takes auto
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "torch" role both model @m {kv_blocks = 40, kv_dtype = "fp8"}
pd.graph @fp8_kv {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK: error: instance @i0: block_tokens 48
// CHECK: vllm takes 8, 16, 32, 64, 128
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "vllm" role both model @m {kv_blocks = 40, block_tokens = 48}
pd.graph @block_size {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK: error: instance @i0: quantization awq
// CHECK: torch takes none
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "torch" role both model @m {kv_blocks = 40, quantization = "awq"}
pd.graph @quantization {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK: error: instance @i0: torch does no speculative decoding
// CHECK: leave draft_tokens and draft_layers out
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "torch" role both model @m {kv_blocks = 40, draft_tokens = 4}
pd.graph @draft {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK: error: "a" asks for adapter "french"
// CHECK: torch takes none
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "torch" role both model @m {kv_blocks = 40}
pd.graph @adapter {
  %new = pd.requests ["a": prompt 20 generate 3 adapter "french"]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK: error: instance @i0: tp 2, pp 1
// CHECK: torch takes at most 1, 1
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1
cluster.instance @i0 on [@g0, @g1] engine "torch" role both model @m {kv_blocks = 40, tp = 2}
pd.graph @ranks {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK: error: instance @i0: 8 heads do not split over tp 3
// CHECK: what does: 1, 2, 4, 8
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1
cluster.device @g2
cluster.instance @i0 on [@g0, @g1, @g2] engine "sim" role both model @m {kv_blocks = 40, tp = 3}
pd.graph @heads {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// A model that does not fit the device, and KV that does not fit beside it.
// CHECK: error: instance @i0: model @m needs 15 GiB for its weights, and its devices have 8 GiB: 6.96 GiB too few
cluster.model @m {layers = 32, hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, ffn = 14336, vocab = 128256}
cluster.device @g0 {memory_bytes = 8589934592}
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 4}
pd.graph @weights {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK: error: instance @i0: 40000 KV blocks need 78.1 GiB beside 15 GiB of weights, and its devices have 80 GiB
// CHECK: what fits: kv_blocks = 33
cluster.model @m {layers = 32, hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, ffn = 14336, vocab = 128256}
cluster.device @g0 {memory_bytes = 85899345920}
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 40000}
pd.graph @kv {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// A budget that no single request fits: said before anything is placed on it.
// CHECK: error: "a": its prompt needs 7 KV blocks of 16 tokens (100 tokens), and @i0, the largest that may hold it, has 6
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 6}
pd.graph @too_small {
  %new = pd.requests ["a": prompt 100 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}
