// RUN: sagec opt -p "assign-kv" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "assign-kv,assign-kv" --split-input-file --verify-diagnostics %s | filecheck %s

// Every row gets blocks for what it has and what it computes within the horizon: "a" 100 + 15
// tokens in blocks of 16, "r" 30 + 16.
// CHECK-LABEL: pd.graph @reserves
// CHECK: kv.reserve on @x [
// CHECK-NEXT: "a": blocks 8,
// CHECK-NEXT: "r": blocks 3
// CHECK-NEXT: ]

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @tiny {kv_blocks = 40}
pd.graph @reserves {horizon = 16} {
  %old = pd.resident on @x ["r": context 30 remaining 200]
  %new = pd.requests ["a": prompt 100 generate 16]
  %kv = pd.prefill %new on @x
  %all = pd.join %old, %kv
  %end = pd.decode %all on @x
  pd.yield %end
}

// Prompts that were begun under a shorter horizon stay, though all that they decode in this one finds
// no blocks: the last of them decodes one token for now. Alone, "a" 155 + 12 and "b" 106 + 12 tokens.
// CHECK-LABEL: pd.graph @begun_under_a_shorter_horizon
// CHECK: kv.reserve on @narrow [
// CHECK-NEXT: "a": blocks 11,
// CHECK-NEXT: "b": blocks 7
// CHECK-NEXT: ]

cluster.instance @narrow on [@g0] engine "sim" role both model @tiny {kv_blocks = 18}
pd.graph @begun_under_a_shorter_horizon {horizon = 16} {
  %new = pd.requests ["a": prompt 155 generate 13 computed 128, "b": prompt 106 generate 13 computed 64]
  %kv = pd.prefill %new on @narrow
  %end = pd.decode %kv on @narrow
  pd.yield %end
}

// With prefill and decode apart each side reserves: the prompt here, prompt and output there.
// CHECK-LABEL: pd.graph @apart
// CHECK: kv.reserve on @x [
// CHECK-NEXT: "a": blocks 1
// CHECK-NEXT: ]
// CHECK-NEXT: kv.reserve on @y [
// CHECK-NEXT: "a": blocks 2
cluster.instance @y on [@g0] engine "sim" role decode model @tiny {kv_blocks = 40}
pd.graph @apart {
  %new = pd.requests ["a": prompt 16 generate 17]
  %kv = pd.prefill %new on @x
  %moved = pd.transfer %kv source @x target @y ["a"]
  %end = pd.decode %moved on @y
  pd.yield %end
}

// Where those that decode need more than there is, the last of them is preempted, and as many
// before it as it takes; a prompt that is under way keeps its blocks.
// CHECK-LABEL: pd.graph @preempts
// CHECK: %kept = pd.preempt %all [
// CHECK-NEXT: "s": preempt on @x because "KV: 60 blocks needed, 40 there"
// CHECK-NEXT: ] : !pd.kv<3>
// CHECK-NEXT: pd.decode %kept on @x : !pd.kv<2>
// CHECK: kv.reserve on @x [
// CHECK-NEXT: "started": blocks 20,
// CHECK-NEXT: "r": blocks 20
// CHECK-NEXT: ]
pd.graph @preempts {
  %new = pd.requests ["started": prompt 304 generate 17 computed 16 on @x]
  %kv = pd.prefill %new on @x
  %old = pd.resident on @x ["r": context 300 remaining 20, "s": context 300 remaining 20]
  %all = pd.join %kv, %old
  %end = pd.decode %all on @x
  pd.yield %end
}

// What only waits preempts nobody: it is packed when there is room.
// CHECK-LABEL: pd.graph @waits
// CHECK-NOT: pd.preempt
// CHECK: kv.reserve on @x [
pd.graph @waits {
  %new = pd.requests ["a": prompt 400 generate 17]
  %kv = pd.prefill %new on @x
  %old = pd.resident on @x ["r": context 500 remaining 20]
  %all = pd.join %kv, %old
  %end = pd.decode %all on @x
  pd.yield %end
}

// Reservations of an earlier run are replaced.
// CHECK-LABEL: pd.graph @again
// CHECK: kv.reserve on @x [
// CHECK-NEXT: "r": blocks 2
// CHECK-NOT: kv.reserve
// CHECK: pd.yield
pd.graph @again {
  kv.reserve on @x ["r": blocks 39]
  %old = pd.resident on @x ["r": context 20 remaining 5]
  %end = pd.decode %old on @x
  pd.yield %end
}

// -----

// A request that no empty instance of this size could hold.
// CHECK: error: "a" needs 7 KV blocks for 112 tokens, and @x has 6 of 16 tokens: 1 too few

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 32, ffn = 128, vocab = 256}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @tiny {kv_blocks = 6}
pd.graph @never_fits {horizon = 1} {
  %new = pd.requests ["b": prompt 10 generate 1, "a": prompt 80 generate 32]
  %kv = pd.prefill %new on @x
  %end = pd.decode %kv on @x
  pd.yield %end
}

// -----

// What was not placed has no instance to reserve on.
// CHECK: error: pd.prefill has no place
// CHECK: run select-device first, or say `on`

pd.graph @no_place {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new
  pd.yield %kv
}

// -----

// CHECK: error: pd.decode has no place
// CHECK: run select-device first, or say `on`

pd.graph @no_place_to_decode {
  %old = pd.resident on @x ["r": context 20 remaining 5]
  %end = pd.decode %old
  pd.yield %end
}

// -----

// CHECK: error: no instance @y
// CHECK: there are: none

pd.graph @no_instance {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @y
  pd.yield %kv
}
