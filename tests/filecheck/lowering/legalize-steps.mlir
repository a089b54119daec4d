// RUN: sagec opt -p "legalize" --split-input-file --verify-diagnostics %s | filecheck %s

// Steps that somebody wrote by hand, or another tool, are held against the engine too.

// Two prompts stay unfinished in one step.
// CHECK: error: instance @i0: step 0 leaves 2 prompts unfinished
// CHECK: turbomind takes 1
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "turbomind" role both model @m {kv_blocks = 40, block_tokens = 64, max_partial_prefills = 1}
pd.graph @two_partials {
  pd.steps @i0 {num_steps = 2, max_step_tokens = 512} ["a": prompt 20 blocks 1, "b": prompt 20 blocks 1]
    chunks {0: "a" [0, 8), "b" [0, 8); 1: "a" [8, 20), "b" [8, 20);}
}

// -----

// The unfinished one must be the last of its step.
// CHECK: error: instance @i0: step 0 goes on after "a", whose prompt it leaves unfinished
// CHECK: turbomind takes an unfinished prompt only as the last of a step
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "turbomind" role both model @m {kv_blocks = 40, block_tokens = 64, max_partial_prefills = 1}
pd.graph @partial_first {
  pd.steps @i0 {num_steps = 2, max_step_tokens = 512} ["a": prompt 20 blocks 1, "b": prompt 20 blocks 1]
    chunks {0: "a" [0, 8), "b" [0, 20); 1: "a" [8, 20);}
}

// -----

// An empty step.
// CHECK: error: instance @i0: step 1 computes nothing
// CHECK: turbomind dies of an empty step: leave it out
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "turbomind" role both model @m {kv_blocks = 40, block_tokens = 64, max_partial_prefills = 1}
pd.graph @empty_step {
  pd.steps @i0 {num_steps = 3, max_step_tokens = 512} ["a": prompt 20 blocks 1] chunks {0: "a" [0, 8); 2: "a" [8, 20);}
}

// -----

// More than the budget, in the steps or of the instance.
// CHECK: error: instance @i0: step 0 computes 20 tokens
// CHECK: its budget is 16
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 40}
pd.graph @budget {
  pd.steps @i0 {num_steps = 1, max_step_tokens = 16} ["a": prompt 20 blocks 2] chunks {0: "a" [0, 20);}
}

// -----

// CHECK: error: instance @i0: steps of 600 tokens
// CHECK: its budget is 512
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 40}
pd.graph @larger_budget {
  pd.steps @i0 {num_steps = 1, max_step_tokens = 600} ["a": prompt 20 blocks 2] chunks {0: "a" [0, 20);}
}

// -----

// CHECK: error: instance @i0: step 0 holds 41 KV blocks
// CHECK: it has 40
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 40}
pd.graph @kv {
  pd.steps @i0 {num_steps = 1, max_step_tokens = 16} ["a": prompt 12 blocks 2] chunks {0: "a" [0, 12);}
    estimates {step_us = #pd.column<1>, step_tokens = #pd.column<12>, step_blocks = #pd.column<41>}
}

// -----

// Chunks of a prompt follow each other.
// CHECK: error: instance @i0: "a": the chunk [12, 20) does not begin where the one before ended
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 40}
pd.graph @gap {
  pd.steps @i0 {num_steps = 2, max_step_tokens = 16} ["a": prompt 20 blocks 2] chunks {0: "a" [0, 8); 1: "a" [12, 20);}
}
