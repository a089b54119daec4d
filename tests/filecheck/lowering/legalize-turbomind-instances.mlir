// RUN: sagec opt -p "legalize" --split-input-file --verify-diagnostics %s | filecheck %s

// What TurboMind's kernels, ranks and sampling take.

// Blocks of any multiple of 64 tokens, KV of 8 bits, two ranks.
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.device @g1 like @g0
cluster.instance @x on [@g0, @g1] engine "turbomind" role both model @m {kv_blocks = 400, max_partial_prefills = 1, tp = 2, kv_dtype = "int8", block_tokens = 192}
pd.graph @legal {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// Blocks of 16 tokens are too small for its kernels.
// CHECK: error: instance @x: block_tokens 16
// CHECK: turbomind takes 64, 128, 256, ...

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, max_partial_prefills = 1, block_tokens = 16}
pd.graph @block_size {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// The toy maths takes them: on a CPU.
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "cpu"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, max_partial_prefills = 1, block_tokens = 16}
pd.graph @toy_on_a_cpu {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// And wherever its options say so.
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, max_partial_prefills = 1, block_tokens = 16, options = "maths=toy"}
pd.graph @toy_by_option {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// On a CPU that is to run the real maths it does not.
// CHECK: error: instance @x: block_tokens 16

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "cpu"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, max_partial_prefills = 1, block_tokens = 16, options = "maths=model"}
pd.graph @no_toy {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// Heads that no kernel is compiled for.
// CHECK: error: instance @x: head_dim 96 of @m
// CHECK: turbomind takes 64, 128, 192

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 96, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1}
pd.graph @head_dim {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// Of heads of 192, KV of 4 bits.
// CHECK: error: instance @x: kv_dtype int4 with head_dim 192
// CHECK: turbomind takes auto or int8 there

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 192, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1, kv_dtype = "int4"}
pd.graph @int4_of_192 {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// KV of another type than its quantisation makes.
// CHECK: error: instance @x: kv_dtype fp8
// CHECK: turbomind takes auto, int8, int4

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1, kv_dtype = "fp8"}
pd.graph @kv_dtype {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// KV of another type than it computes in.
// CHECK: error: instance @x: kv_dtype bf16
// CHECK: turbomind keeps KV in f16, int8 or int4

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1, dtype = "f16", kv_dtype = "bf16"}
pd.graph @kv_of_another_type {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// Types of 32 bits.
// CHECK: error: instance @x: dtype f32
// CHECK: turbomind computes in f16 or bf16

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1, dtype = "f32"}
pd.graph @dtype {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// Also where the model says it.
// CHECK: error: instance @x: @m is f32, which turbomind does not compute in
// CHECK: say dtype = "f16" or "bf16"

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256, dtype = "f32"}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1}
pd.graph @model_dtype {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// Three ranks.
// CHECK: error: instance @x: tp 3
// CHECK: turbomind takes 1, 2, 4 or 8

cluster.model @m {layers = 2, hidden = 512, heads = 12, kv_heads = 6, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.instance @x on [@g0, @g1, @g2] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1, tp = 3}
pd.graph @tp_3 {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// More ranks than there are kernels for.
// CHECK: error: instance @x: tp 16, pp 1
// CHECK: turbomind takes at most 8, 1

cluster.model @m {layers = 2, hidden = 512, heads = 16, kv_heads = 16, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.device @g3 like @g0
cluster.device @g4 like @g0
cluster.device @g5 like @g0
cluster.device @g6 like @g0
cluster.device @g7 like @g0
cluster.device @g8 like @g0
cluster.device @g9 like @g0
cluster.device @g10 like @g0
cluster.device @g11 like @g0
cluster.device @g12 like @g0
cluster.device @g13 like @g0
cluster.device @g14 like @g0
cluster.device @g15 like @g0
cluster.instance @x on [@g0, @g1, @g2, @g3, @g4, @g5, @g6, @g7, @g8, @g9, @g10, @g11, @g12, @g13, @g14, @g15] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1, tp = 16}
pd.graph @tp_16 {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// More ranks than KV heads, which do not share them evenly.
// CHECK: error: instance @x: 3 KV heads are not shared evenly by tp 4
// CHECK: at most tp 3

cluster.model @m {layers = 2, hidden = 512, heads = 12, kv_heads = 3, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.device @g3 like @g0
cluster.instance @x on [@g0, @g1, @g2, @g3] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1, tp = 4}
pd.graph @kv_heads {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// Pipeline stages.
// CHECK: error: instance @x: tp 1, pp 2
// CHECK: turbomind takes at most 8, 1

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.device @g1 like @g0
cluster.instance @x on [@g0, @g1] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1, pp = 2}
pd.graph @pp {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// Drafts.
// CHECK: error: instance @x: turbomind does no speculative decoding
// CHECK: leave draft_tokens and draft_layers out

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1, draft_tokens = 4, draft_layers = 1}
pd.graph @drafts {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// An option that makes its steps smaller than plans may.
// CHECK: error: instance @x: option step_tokens=256, and its max_step_tokens is 512
// CHECK: say 512 or more

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1, options = "step_tokens=256"}
pd.graph @step_tokens {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// Or its batches.
// CHECK: error: instance @x: option max_batch=32, and its max_batch is 64
// CHECK: say 64 or more

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1, max_batch = 64, options = "max_batch=32"}
pd.graph @max_batch {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// A request that is sampled among more tokens than its kernel sorts.
// CHECK: error: "a" is sampled among its 2000 likeliest tokens
// CHECK: turbomind takes top_k 1024 at most, or 0: all of them

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1}
pd.graph @top_k {
  %w = pd.requests ["a": prompt 600 generate 8 top_k 2000]
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// As many as it sorts.
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1}
pd.graph @top_k_of_1024 {
  %w = pd.requests ["a": prompt 600 generate 8 top_k 1024]
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// Two outputs of one prompt.
// CHECK: error: "a" asks 2 outputs of one prompt
// CHECK: turbomind takes at most 1

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1}
pd.graph @samples {
  %w = pd.requests ["a": prompt 600 generate 8 samples 2]
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// An adapter.
// CHECK: error: "a" asks for adapter "sql"
// CHECK: turbomind takes none

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1}
pd.graph @adapter {
  %w = pd.requests ["a": prompt 600 generate 8 adapter "sql"]
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// KV of who is preempted goes to host memory and comes back.
// CHECK: pd.preempt
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 2, head_dim = 128, ffn = 1024, vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1}
pd.graph @swaps {
  %r = pd.resident on @x ["r": context 30 remaining 8]
  %kept = pd.preempt %r ["r": swap on @x]
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10] chunks {0: "a" [0, 200)}
  pd.yield
}
