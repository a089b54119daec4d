// RUN: sagec opt -p "serve" --split-input-file --verify-diagnostics %s | filecheck %s

// Instances, and what requests ask of them.

// What an engine can do passes, and is not changed.
// CHECK: pd.graph @legal
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "torch" role both model @m {kv_blocks = 400}
pd.graph @legal {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// An engine that has no target here.
// CHECK: error: instance @x: no target 'tensorrt'
// CHECK: there are: echo, embedded, sim, torch, turbomind, vllm

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "tensorrt" role both model @m {kv_blocks = 400}
pd.graph @unknown_engine {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Sizes of a block that the engine does not take.
// CHECK: error: instance @x: block_tokens 48
// CHECK: vllm takes 8, 16, 32, 64, 128

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "vllm" role both model @m {kv_blocks = 400, block_tokens = 48}
pd.graph @block_size {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Types of KV that it does not take: FP8 is refused by turbomind and torch, taken by vllm.
// CHECK: error: instance @x: kv_dtype fp8
// CHECK: turbomind takes auto, int8, int4

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, kv_dtype = "fp8", max_partial_prefills = 1}
pd.graph @fp8_kv_of_turbomind {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// And by torch, which keeps KV in the type of the model.
// CHECK: error: instance @x: kv_dtype fp8
// CHECK: torch takes auto

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "torch" role both model @m {kv_blocks = 400, kv_dtype = "fp8"}
pd.graph @fp8_kv_of_torch {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Taken by vllm.
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "vllm" role both model @m {kv_blocks = 400, kv_dtype = "fp8"}
pd.graph @fp8_kv_of_vllm {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// The model's own type is no other type.
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "torch" role both model @m {kv_blocks = 400, kv_dtype = "bf16"}
pd.graph @own_kv_type {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Weights in a format that it does not read.
// CHECK: error: instance @x: quantization awq
// CHECK: torch takes none

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "torch" role both model @m {kv_blocks = 400, quantization = "awq"}
pd.graph @quantization {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// More ranks than it runs on.
// CHECK: error: instance @x: tp 1, pp 2
// CHECK: torch takes at most 8, 1

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.instance @x on [@g0, @g1] engine "torch" role both model @m {pp = 2, kv_blocks = 400}
pd.graph @ranks {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Heads that do not split over the ranks.
// CHECK: error: instance @x: 4 heads do not split over tp 3
// CHECK: what does: 1, 2, 4

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.instance @x on [@g0, @g1, @g2] engine "vllm" role both model @m {tp = 3, kv_blocks = 400}
pd.graph @heads {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// KV heads that do not split, though the heads do.
// CHECK: error: instance @x: 6 KV heads do not split over tp 4
// CHECK: what does: 1, 2, 3, 6

cluster.model @m {layers = 2, hidden = 64, heads = 12, kv_heads = 6, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.device @g3 like @g0
cluster.instance @x on [@g0, @g1, @g2, @g3] engine "vllm" role both model @m {tp = 4, kv_blocks = 400}
pd.graph @kv_heads {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// More stages than layers.
// CHECK: error: instance @x: 2 layers do not split over pp 3
// CHECK: at most 2

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.instance @x on [@g0, @g1, @g2] engine "vllm" role both model @m {tp = 1, pp = 3, kv_blocks = 400}
pd.graph @stages {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Speculative decoding where the engine has none.
// CHECK: error: instance @x: torch does no speculative decoding
// CHECK: leave draft_tokens and draft_layers out

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "torch" role both model @m {kv_blocks = 400, draft_tokens = 4}
pd.graph @drafts {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// A model that does not fit its device: what it needs, what there is, what is missing.
// CHECK: error: instance @x: model @m needs 15 GiB for its weights, and its devices have 8 GiB: 6.96 GiB too few

cluster.model @m {layers = 32, hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, ffn = 14336, vocab = 128256, dtype = "bf16"}
cluster.device @g0 {memory_bytes = 8589934592}
cluster.instance @x on [@g0] engine "torch" role both model @m {kv_blocks = 400}
pd.graph @too_large_a_model {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// KV that does not fit beside the weights: how many blocks would.
// CHECK: error: instance @x: 9000000 KV blocks need 68.7 GiB beside 0.000244 GiB of weights, and its devices have 16 GiB
// CHECK: what fits: kv_blocks = 2097120

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "torch" role both model @m {kv_blocks = 9000000}
pd.graph @too_many_blocks {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Several outputs of one prompt, more than the engine makes.
// CHECK: error: "b" asks 4 outputs of one prompt
// CHECK: torch takes at most 1

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "torch" role both model @m {kv_blocks = 400}
pd.graph @samples {
  %new = pd.requests ["a": prompt 80 generate 32, "b": prompt 80 generate 32 samples 4]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// An adapter where the engine has none.
// CHECK: error: "b" asks for adapter "blue"
// CHECK: torch takes none

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "torch" role both model @m {kv_blocks = 400}
pd.graph @adapter {
  %new = pd.requests ["a": prompt 80 generate 32, "b": prompt 80 generate 32 adapter "blue"]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// vllm does both.
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "vllm" role both model @m {kv_blocks = 400}
pd.graph @vllm_does_both {
  %new = pd.requests ["a": prompt 80 generate 32 adapter "blue" samples 4]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// A request that the KV of no instance holds never gets as far as here.
// CHECK: error: "a": with its output it needs 7 KV blocks of 16 tokens (112 tokens), and @x, the largest that may hold it, has 6
// CHECK: give it more kv_blocks, or the request less to generate

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "torch" role both model @m {kv_blocks = 6}
pd.graph @never_fits {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}
