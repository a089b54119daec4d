// RUN: sagec opt -p "legalize" --split-input-file --verify-diagnostics %s | filecheck %s

// Rules of TurboMind's loop.

// At most one unfinished prompt, and it is last: what turbomind takes.
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1}
pd.graph @legal {
  pd.steps @x {num_steps = 2, max_step_tokens = 512} ["a": prompt 600 blocks 10, "b": prompt 700 blocks 11, "r": prompt 30 computed 30 blocks 1] chunks {0: "a" [0, 512); 1: "a" [512, 600), "b" [0, 400)}
  pd.yield
}

// -----

// Two unfinished prompts in a step.
// CHECK: error: instance @x: step 0 leaves 2 prompts unfinished
// CHECK: turbomind takes 1

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1}
pd.graph @two_partial_prompts {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10, "b": prompt 700 blocks 11, "r": prompt 30 computed 30 blocks 1] chunks {0: "a" [0, 200), "b" [0, 300)}
  pd.yield
}

// -----

// One, which is not the last.
// CHECK: error: instance @x: step 0 goes on after "a", whose prompt it leaves unfinished
// CHECK: turbomind takes an unfinished prompt only as the last of a step

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1}
pd.graph @partial_prompt_first {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10, "b": prompt 100 blocks 2, "r": prompt 30 computed 30 blocks 1] chunks {0: "a" [0, 200), "b" [0, 100)}
  pd.yield
}

// -----

// A step in which nothing is computed.
// CHECK: error: instance @x: step 1 computes nothing
// CHECK: turbomind as it is dies of an empty step: leave it out

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1}
pd.graph @empty_step {
  pd.steps @x {num_steps = 3, max_step_tokens = 512} ["a": prompt 600 blocks 10, "b": prompt 700 blocks 11, "r": prompt 30 computed 30 blocks 1] chunks {0: "a" [0, 512); 2: "a" [512, 600)}
  pd.yield
}

// -----

// Decodes fill it.
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 1}
pd.graph @decodes_fill_it {
  pd.steps @x {num_steps = 3, max_step_tokens = 512} ["a": prompt 600 blocks 10, "b": prompt 700 blocks 11, "r": prompt 30 computed 30 blocks 1 begin 1 until 31] chunks {0: "a" [0, 512); 2: "a" [512, 600)}
  pd.yield
}

// -----

// An instance that does not say how many prompts it leaves unfinished would leave any number.
// CHECK: error: instance @x: any number of prompts may be unfinished after a step
// CHECK: turbomind takes 1: say max_partial_prefills = 1

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64}
pd.graph @any_number_of_partial_prompts {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10, "b": prompt 700 blocks 11, "r": prompt 30 computed 30 blocks 1] chunks {0: "a" [0, 200)}
  pd.yield
}

// -----

// And one that says more.
// CHECK: error: instance @x: 2 prompts may be unfinished after a step
// CHECK: turbomind takes 1: say max_partial_prefills = 1

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "turbomind" role both model @m {kv_blocks = 400, block_tokens = 64, max_partial_prefills = 2}
pd.graph @two_partial_prompts_allowed {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 10, "b": prompt 700 blocks 11, "r": prompt 30 computed 30 blocks 1] chunks {0: "a" [0, 200)}
  pd.yield
}
