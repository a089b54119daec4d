// RUN: sagec opt -p "legalize" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "legalize,legalize" --split-input-file --verify-diagnostics %s | filecheck %s

// Steps as they were written by hand: what no engine could run.

// Steps that keep every rule.
// CHECK: pd.steps @x

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @m {kv_blocks = 400}
pd.graph @legal {
  pd.steps @x {num_steps = 2, max_step_tokens = 512} ["a": prompt 600 blocks 38, "b": prompt 100 blocks 7] chunks {0: "a" [0, 512); 1: "a" [512, 600), "b" [0, 100)}
  pd.yield
}

// -----

// A budget above that of the instance.
// CHECK: error: instance @x: steps of 1024 tokens
// CHECK: its budget is 512

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @m {kv_blocks = 400}
pd.graph @larger_budget {
  pd.steps @x {num_steps = 1, max_step_tokens = 1024} ["a": prompt 600 blocks 38, "b": prompt 100 blocks 7] chunks {0: "b" [0, 100)}
  pd.yield
}

// -----

// A step over its budget.
// CHECK: error: instance @x: step 1 computes 588 tokens
// CHECK: its budget is 512

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @m {kv_blocks = 400}
pd.graph @over_budget {
  pd.steps @x {num_steps = 2, max_step_tokens = 512} ["a": prompt 600 blocks 38, "b": prompt 100 blocks 7] chunks {0: "b" [0, 100); 1: "a" [0, 588)}
  pd.yield
}

// -----

// Where decodes are predicted beside the chunks, they count.
// CHECK: error: instance @x: step 0 computes 513 tokens
// CHECK: its budget is 512

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @m {kv_blocks = 400}
pd.graph @decodes_count {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 38, "b": prompt 100 blocks 7] chunks {0: "a" [0, 512)} estimates {step_tokens = #pd.column<513>}
  pd.yield
}

// -----

// More blocks than there are.
// CHECK: error: instance @x: step 1 holds 401 KV blocks
// CHECK: it has 400

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @m {kv_blocks = 400}
pd.graph @blocks {
  pd.steps @x {num_steps = 2, max_step_tokens = 512} ["a": prompt 600 blocks 38, "b": prompt 100 blocks 7] chunks {0: "a" [0, 512); 1: "a" [512, 600)} estimates {step_blocks = #pd.column<38, 401>}
  pd.yield
}

// -----

// A gap between two chunks of a prompt.
// CHECK: error: instance @x: "a": the chunk [512, 600) does not begin where the one before ended

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @m {kv_blocks = 400}
pd.graph @gap {
  pd.steps @x {num_steps = 2, max_step_tokens = 512} ["a": prompt 600 blocks 38, "b": prompt 100 blocks 7] chunks {0: "a" [0, 500); 1: "b" [0, 100), "a" [512, 600)}
  pd.yield
}

// -----

// Steps of an instance that is not there.
// CHECK: error: no instance @y
// CHECK: there are: @x

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @m {kv_blocks = 400}
pd.graph @no_instance {
  pd.steps @y {num_steps = 1, max_step_tokens = 512} ["a": prompt 600 blocks 38, "b": prompt 100 blocks 7] chunks {0: "b" [0, 100)}
  pd.yield
}
