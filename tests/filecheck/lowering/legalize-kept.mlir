// RUN: sagec opt -p "legalize" --split-input-file --verify-diagnostics %s | filecheck %s

// KV that was kept: of requests that are done, or of one that was swapped out.

// An engine that keeps both.
// CHECK-LABEL: pd.graph @all_is_kept
// CHECK: pd.steps @x
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "torch" role both model @m {kv_blocks = 400}
pd.graph @all_is_kept {
  %old = pd.resident on @x ["r": context 9, "s": context 9]
  %kept = pd.preempt %old ["r": swap on @x]
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 100 cached 64 blocks 7] chunks {0: "a" [64, 100)}
  pd.yield
}

// -----

// vLLM keeps prefixes, and has requests that are preempted computed again.
// CHECK: error: instance @x: "s" is to be swapped out, and vllm takes no KV to host memory
// CHECK: preempt it instead
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "vllm" role both model @m {kv_blocks = 400}
pd.graph @swapped {
  %old = pd.resident on @x ["r": context 9, "s": context 9]
  %kept = pd.preempt %old ["r": preempt on @x, "s": swap on @x]
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 100 cached 64 blocks 7] chunks {0: "a" [64, 100)}
  pd.yield
}

// -----

// Of somebody's own engine nothing is known but that it steps.
// CHECK: error: instance @x: "b" is to begin with 64 tokens that were computed before, and embedded keeps none
// CHECK: leave the match out
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "embedded" role both model @m {kv_blocks = 400}
pd.graph @reused {
  pd.steps @x {num_steps = 1, max_step_tokens = 512} ["a": prompt 9 blocks 1, "b": prompt 100 cached 64 blocks 7] chunks {0: "a" [0, 9), "b" [64, 100)}
  pd.yield
}
