// RUN: sagec opt -p "fuse-steps" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "fuse-steps,fuse-steps" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "fuse-steps{mode=time-share turn=2}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix SHARE
// RUN: sagec opt -p "fuse-steps{mode=strict}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix STRICT
// RUN: sagec opt -p "fuse-steps{turn=0}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix TURN
// TURN: error: fuse-steps: turn=0; at least 1 step of decodes

// Stall-free: the two that decode go first, a token each, and prompts take what is left of the
// budget of 64; the first prompt goes on before the second begins, and decodes from the step after
// its last chunk.
// CHECK-LABEL: pd.graph @stall_free
// CHECK: pd.steps @x of %kv, %end {num_steps = 6, max_step_tokens = 64} [
// CHECK-NEXT: "a": prompt 70 blocks 5 begin 2 until 73,
// CHECK-NEXT: "b": prompt 100 blocks 7 begin 3 until 102,
// CHECK-NEXT: "r": prompt 30 computed 30 blocks 3 until 36,
// CHECK-NEXT: "s": prompt 40 computed 40 blocks 3 until 42
// CHECK-NEXT: ] chunks {
// CHECK-NEXT: 0: "a" [0, 62);
// CHECK-NEXT: 1: "a" [62, 70), "b" [0, 54);
// CHECK-NEXT: 2: "b" [54, 100);
// CHECK-NEXT: } estimates {
// CHECK-SAME: step_tokens = #pd.column<64, 64, 48, 3, 3, 1>

// Time-share: a step of prompts alone, then two steps of decodes.
// SHARE-LABEL: pd.graph @stall_free
// SHARE: chunks {
// SHARE-NEXT: 0: "a" [0, 64);
// SHARE-NEXT: 3: "a" [64, 70), "b" [0, 58);
// SHARE-NEXT: 6: "b" [58, 100);
// SHARE: step_tokens = #pd.column<64, 2, 2, 64, 2, 2, 42, 3, 2>

// Strict, and both phases on one instance: prompts first, then decodes.
// STRICT-LABEL: pd.graph @stall_free
// STRICT: chunks {
// STRICT-NEXT: 0: "a" [0, 64);
// STRICT-NEXT: 1: "a" [64, 70), "b" [0, 58);
// STRICT-NEXT: 2: "b" [58, 100);
// STRICT: step_tokens = #pd.column<64, 64, 42, 4, 4, 2, 1, 1, 1>

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @tiny {kv_blocks = 400, max_step_tokens = 64}
pd.graph @stall_free {
  %new = pd.requests ["a": prompt 70 generate 4, "b": prompt 100 generate 3]
  %kv = pd.prefill %new on @x
  %old = pd.resident on @x ["r": context 30 remaining 6, "s": context 40 remaining 2]
  %all = pd.join %kv, %old
  %end = pd.decode %all on @x
  pd.yield %end
}

// The mode that the graph says counts where the pass says none.
// CHECK-LABEL: pd.graph @says_its_mode
// CHECK: chunks {
// CHECK-NEXT: 0: "a" [0, 64);
// CHECK-NEXT: 5: "a" [64, 70);
pd.graph @says_its_mode {mode = "time-share"} {
  %new = pd.requests ["a": prompt 70 generate 1]
  %kv = pd.prefill %new on @x
  %old = pd.resident on @x ["r": context 30 remaining 6]
  %all = pd.join %kv, %old
  %end = pd.decode %all on @x
  pd.yield %end
}

// Bounds of chunks hold, what is under way goes first, and what is cached is not computed.
// CHECK-LABEL: pd.graph @bounds
// CHECK: "started": prompt 50 computed 20 blocks 4
// CHECK: chunks {
// CHECK-NEXT: 0: "started" [20, 50), "hit" [16, 32), "a" [0, 18);
// CHECK-NEXT: 1: "hit" [32, 40), "a" [18, 50);
// CHECK-NEXT: 2: "a" [50, 60);
// CHECK-NEXT: }
pd.graph @bounds {
  %new = pd.requests [
    "hit": prompt 40 cached 16 generate 1,
    "a": prompt 60 generate 1,
    "started": prompt 50 computed 20 generate 1 on @x
  ]
  %kv = pd.prefill %new on @x bounds [[16, 32, 40], [0, 50, 60], [20, 50]]
  pd.yield %kv
}

// A horizon ends the plan in the middle of a prompt; rows that got nothing are left out.
// CHECK-LABEL: pd.graph @horizon
// CHECK: pd.steps @x of %kv, %end {num_steps = 2, max_step_tokens = 64} [
// CHECK-NEXT: "a": prompt 200 blocks 13
// CHECK-NEXT: ] chunks {
// CHECK-NEXT: 0: "a" [0, 64);
// CHECK-NEXT: 1: "a" [64, 128);
// CHECK-NEXT: }
pd.graph @horizon {horizon = 2} {
  %new = pd.requests ["a": prompt 200 generate 5, "b": prompt 10 generate 5]
  %kv = pd.prefill %new on @x
  %end = pd.decode %kv on @x
  pd.yield %end
}

// The graph bounds the prompt tokens of a step: decodes beside them come in time.
// CHECK-LABEL: pd.graph @bounded_steps
// CHECK: chunks {
// CHECK-NEXT: 0: "a" [0, 32);
// CHECK-NEXT: 1: "a" [32, 40), "b" [0, 24);
// CHECK-NEXT: 2: "b" [24, 30);
// CHECK-NEXT: }
pd.graph @bounded_steps {step_prompt_tokens = 32} {
  %new = pd.requests ["a": prompt 40 generate 1, "b": prompt 30 generate 1]
  %kv = pd.prefill %new on @x
  %old = pd.resident on @x ["r": context 30 remaining 6]
  %all = pd.join %kv, %old
  %end = pd.decode %all on @x
  pd.yield %end
}

// It is somebody's turn: one instance gets the steps of it, the other stops.
// CHECK-LABEL: pd.graph @turns
// CHECK: pd.steps @y {num_steps = 0, max_step_tokens = 64} []
// CHECK-NEXT: pd.steps @x of %end {num_steps = 3, max_step_tokens = 64} [
// CHECK-NEXT: "r": prompt 30 computed 30 blocks 3 until 33
// CHECK-NEXT: ] estimates
cluster.instance @y on [@g0] engine "sim" role both model @tiny {kv_blocks = 400, max_step_tokens = 64}
pd.graph @turns {horizon = 16} {
  pd.turns ["x": steps 3, "y": steps 0 because "the turn of x"]
  %old = pd.resident ["r": on @x context 30 remaining 6, "s": on @y context 40 remaining 2]
  %end = pd.decode %old on [@x, @y]
  pd.yield %end
}

// What an instance prefills for another that pauses goes there all the same, and waits.
// CHECK-LABEL: pd.graph @hands_over_to_one_that_pauses
// CHECK: pd.steps @y {num_steps = 0, max_step_tokens = 64} []
// CHECK-NEXT: pd.steps @x of %kv {num_steps = 1, max_step_tokens = 64} [
// CHECK-NEXT: "a": prompt 20 blocks 2 target @y
pd.graph @hands_over_to_one_that_pauses {
  pd.turns ["y": steps 0]
  %new = pd.requests ["a": prompt 20 generate 5]
  %kv = pd.prefill %new on @x
  %moved = pd.transfer %kv source @x target @y ["a"]
  %end = pd.decode %moved on @y
  pd.yield %end
}

// -----

// CHECK: error: no instance @z
// CHECK: there are: @x
cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @tiny {kv_blocks = 5}
pd.graph @turn_of_nobody {
  pd.turns ["z": steps 1]
}

// -----

// CHECK: error: @x has two turns in one graph
// CHECK: say it once
cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @tiny {kv_blocks = 5}
pd.graph @two_turns {
  pd.turns ["x": steps 1]
  pd.turns ["x": steps 2]
}

// -----

// KV binds: the second prompt waits until the first has left, the resident having its blocks.
// CHECK-LABEL: pd.graph @waits_for_blocks
// CHECK: chunks {
// CHECK-NEXT: 0: "a" [0, 30);
// CHECK-NEXT: 3: "b" [0, 40);
// CHECK-NEXT: } estimates
// CHECK-SAME: step_blocks = #pd.column<3, 3, 3, 4, 3>

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @tiny {kv_blocks = 5, max_step_tokens = 64}
pd.graph @waits_for_blocks {
  %new = pd.requests ["a": prompt 30 generate 3, "b": prompt 40 generate 2]
  %kv = pd.prefill %new on @x
  %old = pd.resident on @x ["r": context 10 remaining 4]
  %all = pd.join %kv, %old
  %end = pd.decode %all on @x
  pd.yield %end
}

// -----

// At most two rows a step, and one unfinished prompt; a third waits for a seat.
// CHECK-LABEL: pd.graph @seats
// CHECK: chunks {
// CHECK-NEXT: 0: "a" [0, 20);
// CHECK-NEXT: 1: "a" [20, 40);
// CHECK-NEXT: 2: "a" [40, 50), "b" [0, 10);
// CHECK-NEXT: 3: "b" [10, 30);
// CHECK-NEXT: 4: "c" [0, 5);
// CHECK-NEXT: }

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @tiny {kv_blocks = 50, max_step_tokens = 20, max_batch = 2, max_partial_prefills = 1}
pd.graph @seats {
  %new = pd.requests ["a": prompt 50 generate 1, "b": prompt 30 generate 1, "c": prompt 5 generate 1]
  %kv = pd.prefill %new on @x
  pd.yield %kv
}

// -----

// Apart: the prompt's KV leaves after its last chunk; there the row decodes when it has come, and
// the step that waits for nobody decodes the resident.
// CHECK-LABEL: pd.graph @apart
// CHECK: pd.steps @p0 of %kv {num_steps = 2, max_step_tokens = 64} [
// CHECK-NEXT: "a": prompt 70 blocks 5 target @d0
// CHECK: 1: "a" [64, 70);
// CHECK: pd.steps @d0 of %end {num_steps = {{[0-9]+}}, max_step_tokens = 512} [
// CHECK-NEXT: "r": prompt 30 computed 30 blocks 4 until 50,
// CHECK-NEXT: "a": prompt 70 blocks 5 until 73 source @p0
// CHECK-NEXT: ] estimates

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @tiny {kv_blocks = 400, max_step_tokens = 64}
cluster.instance @d0 on [@g0] engine "sim" role decode model @tiny {kv_blocks = 400}
pd.graph @apart {
  %old = pd.resident on @d0 ["r": context 30 remaining 20]
  %new = pd.requests ["a": prompt 70 generate 4]
  %kv = pd.prefill %new on @p0
  %all = pd.join %old, %kv
  %moved = pd.transfer %all source @p0 target @d0 ["a": us 100]
  %end = pd.decode %moved on @d0
  pd.yield %end
}

// -----

// Two instances that await each other's KV: both plans know what comes.
// CHECK-LABEL: pd.graph @crosswise
// CHECK: pd.steps @x of
// CHECK: "b": prompt 16 blocks 2 until 19 source @y
// CHECK: pd.steps @y of
// CHECK: "a": prompt 16 blocks 2 until 19 source @x

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @tiny {kv_blocks = 50}
cluster.instance @y on [@g0] engine "sim" role both model @tiny {kv_blocks = 50}
pd.graph @crosswise {
  %new = pd.requests ["a": prompt 16 generate 4, "b": prompt 16 generate 4]
  %kv = pd.prefill %new on [@x, @y]
  %moved = pd.transfer %kv ["a": source @x target @y, "b": source @y target @x]
  %end = pd.decode %moved on [@y, @x]
  pd.yield %end
}

// -----

// More residents than a step takes: the rest decode as places get free.
// CHECK-LABEL: pd.graph @more_than_a_step_takes
// CHECK: "r": prompt 30 computed 30 blocks 2 until 32,
// CHECK-NEXT: "s": prompt 40 computed 40 blocks 3 until 43,
// CHECK-NEXT: "t": prompt 50 computed 50 blocks 4 begin 2 until 52
// CHECK: step_tokens = #pd.column<2, 2, 2, 1>

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @tiny {kv_blocks = 50, max_batch = 2}
pd.graph @more_than_a_step_takes {
  %old = pd.resident on @x ["r": context 30 remaining 2, "s": context 40 remaining 3, "t": context 50 remaining 2]
  %end = pd.decode %old on @x
  pd.yield %end
}

// -----

// CHECK: error: pd.prefill has no place
// CHECK: run select-device first, or say `on`

pd.graph @no_place {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  pd.yield %kv
}
