// RUN: sagec opt -p "fuse-steps" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "fuse-steps,fuse-steps" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "fuse-steps{mode=time-share turn=2}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix SHARE
// RUN: sagec opt -p "fuse-steps{turn=0}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix TURN

// TURN: error: fuse-steps: turn=0
// TURN: at least 1 step of decodes

// Stall-free batching: the resident decodes in every step, and the prompts share what is left of
// the 16 tokens. "a" ends in step 1 and decodes from step 2 on.
// CHECK-LABEL: pd.graph @stall_free
// CHECK: pd.steps @i0 of %kv, %end {num_steps = 6, max_step_tokens = 16} [
// CHECK-NEXT: "a": prompt 20 blocks 2 begin 2 until 22,
// CHECK-NEXT: "b": prompt 12 blocks 1 begin 3 until 14,
// CHECK-NEXT: "r": prompt 9 computed 9 blocks 1 until 15
// CHECK-NEXT: ] chunks {
// CHECK-NEXT: 0: "a" [0, 15);
// CHECK-NEXT: 1: "a" [15, 20), "b" [0, 10);
// CHECK-NEXT: 2: "b" [10, 12);
// CHECK-NEXT: } estimates {{.*}}step_tokens = #pd.column<16, 16, 4, 3, 2, 1>, step_blocks = #pd.column<3, 4, 4, 4, 2, 1>}

// By turns: a step of prompts, then two of decodes; nobody decodes beside a chunk.
// SHARE-LABEL: pd.graph @stall_free
// SHARE: chunks {
// SHARE-NEXT: 0: "a" [0, 16);
// SHARE-NEXT: 3: "a" [16, 20), "b" [0, 12);
// SHARE-NEXT: } estimates {{.*}}step_tokens = #pd.column<16, 1, 1, 16, 3, 3, 1, 1>
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 40, max_step_tokens = 16}
pd.graph @stall_free {
  %old = pd.resident on @i0 ["r": context 9 remaining 6]
  %new = pd.requests ["a": prompt 20 generate 3, "b": prompt 12 generate 3]
  %kv = pd.prefill %new on @i0
  %all = pd.join %old, %kv
  %end = pd.decode %all on @i0
  pd.yield %end
}

// -----

// Chunk bounds hold for every step; a step takes chunks of several prompts.
// CHECK-LABEL: pd.graph @bounds
// CHECK: chunks {
// CHECK-NEXT: 0: "a" [0, 4), "b" [0, 3);
// CHECK-NEXT: 1: "a" [4, 8);
// CHECK-NEXT: 2: "a" [8, 10);
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 40, max_step_tokens = 16}
pd.graph @bounds {
  %new = pd.requests ["a": prompt 10 generate 1, "b": prompt 3 generate 1]
  %kv = pd.prefill %new on @i0 bounds [[0, 4, 8, 10], [0, 3]] : !pd.kv<2>
  %end = pd.decode %kv on @i0
}

// -----

// An engine that leaves one prompt unfinished at most gets it as the last of its step.
// CHECK-LABEL: pd.graph @one_partial
// CHECK: chunks {
// CHECK-NEXT: 0: "a" [0, 4);
// CHECK-NEXT: 1: "a" [4, 8);
// CHECK-NEXT: 2: "a" [8, 10), "b" [0, 3);
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 40, max_step_tokens = 16, max_partial_prefills = 1}
pd.graph @one_partial {
  %new = pd.requests ["a": prompt 10 generate 1, "b": prompt 3 generate 1]
  %kv = pd.prefill %new on @i0 bounds [[0, 4, 8, 10], [0, 3]] : !pd.kv<2>
  %end = pd.decode %kv on @i0
}

// -----

// A prompt begins when all of its blocks are free, and nobody behind overtakes it: "b" and "c"
// wait until "a" has left, for 3 of 4 blocks are its.
// CHECK-LABEL: pd.graph @waits_for_kv
// CHECK: chunks {
// CHECK-NEXT: 0: "a" [0, 33);
// CHECK-NEXT: 3: "b" [0, 20), "c" [0, 3);
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 4}
pd.graph @waits_for_kv {
  %new = pd.requests ["a": prompt 33 generate 3, "b": prompt 20 generate 3, "c": prompt 3 generate 3]
  %kv = pd.prefill %new on @i0
  %end = pd.decode %kv on @i0
}

// -----

// Prefill and decode apart: rows go from one table to the other, and nobody waits for them, so
// they may decode from step 0 on. What the horizon does not reach is left for the next round.
// CHECK-LABEL: pd.graph @apart
// CHECK: pd.steps @p0 of %kv {num_steps = 2, max_step_tokens = 16} [
// CHECK-NEXT: "a": prompt 20 blocks 2 target @d0,
// CHECK-NEXT: "b": prompt 30 blocks 2 target @d0
// CHECK-NEXT: ] chunks {
// CHECK-NEXT: 0: "a" [0, 16);
// CHECK-NEXT: 1: "a" [16, 20), "b" [0, 12);
// CHECK: pd.steps @d0 of %end {num_steps = 2, max_step_tokens = 512} [
// CHECK-NEXT: "a": prompt 20 blocks 2 until 22 source @p0
// CHECK-NEXT: ]
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 40, max_step_tokens = 16}
cluster.instance @d0 on [@g0] engine "sim" role decode model @m {kv_blocks = 40}
pd.graph @apart {mode = "strict", horizon = 2} {
  %new = pd.requests ["a": prompt 20 generate 9, "b": prompt 30 generate 9, "c": prompt 5 generate 9]
  %kv = pd.prefill %new on @p0
  %moved = pd.transfer %kv source @p0 target @d0 ["a", "b", "c"]
  %end = pd.decode %moved on @d0
}

// -----

// Rows beyond what a step takes stand by until others are done.
// CHECK-LABEL: pd.graph @seats
// CHECK: "a": prompt 4 computed 4 blocks 1 until 6,
// CHECK-NEXT: "b": prompt 4 computed 4 blocks 1 until 7,
// CHECK-NEXT: "c": prompt 4 computed 4 blocks 1 begin 2 until 6
// CHECK: step_tokens = #pd.column<2, 2, 2, 1>
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 40, max_batch = 2}
pd.graph @seats {
  %old = pd.resident on @i0 ["a": context 4 remaining 2, "b": context 4 remaining 3, "c": context 4 remaining 2]
  %end = pd.decode %old on @i0
}
