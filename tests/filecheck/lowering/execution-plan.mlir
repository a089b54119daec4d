// RUN: sagec opt -p "serve" -t "plan{form=text}" --split-input-file %s | filecheck %s

// A pair: the prompt is computed and exported on one side, imported and decoded on the other.
// CHECK: plan "pair/p0" round 7 instance p0 mode strict steps 2 budget 16
// CHECK-NEXT: row "a" prompt 20 computed 0 blocks 2 deadline 900
// CHECK-NEXT: step 0: "a" [0, 16)
// CHECK-NEXT: step 1: "a" [16, 20) samples
// CHECK-NEXT: export "a" to d0 tokens 20
// CHECK-NEXT: estimate us
// CHECK-NEXT: estimate tokens 16 4
// CHECK-NEXT: estimate kv_blocks 2x2
// CHECK-EMPTY:
// CHECK-NEXT: plan "pair/d0" round 7 instance d0 mode strict steps 2 budget 512
// CHECK-NEXT: row "a" prompt 20 computed 0 blocks 2 deadline 900
// CHECK-NEXT: import "a" from p0 tokens 20
// CHECK-NEXT: decode "a" from 0 until 22
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "torch" role prefill model @m {kv_blocks = 40, max_step_tokens = 16}
cluster.instance @d0 on [@g0] engine "torch" role decode model @m {kv_blocks = 40}
pd.graph @pair {mode = "strict", round = 7} {
  %new = pd.requests ["a": prompt 20 generate 3 deadline 900]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// Who leaves, what is reused, evicted and migrated.
// CHECK: plan "all/i0" round 0 instance i0 mode hybrid
// CHECK-NEXT: row "a" prompt 40 computed 0 blocks 3
// CHECK-NEXT: row "r" prompt 9 computed 9 blocks 1
// CHECK-NEXT: row "s" prompt 0 computed 0 blocks 0
// CHECK-NEXT: row "t" prompt 0 computed 0 blocks 0
// CHECK-NEXT: preempt "s" recompute
// CHECK-NEXT: preempt "t" swap
// CHECK-NEXT: reuse "a" tokens 32
// CHECK-NEXT: evict 17
// CHECK-NEXT: evict 42
// CHECK-NEXT: migrate 5 from device to host
// CHECK-NEXT: step 0: "a" [32, 40) samples
// CHECK-NEXT: decode "a" from 1 until 42
// CHECK-NEXT: decode "r" from 0 until 11
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "sim" role both model @m {kv_blocks = 40}
pd.graph @all {
  %old = pd.resident on @i0 ["r": context 9 remaining 2, "s": context 9, "t": context 9]
  %kept = pd.decide %old ["s": preempt, "t": swap]
  %new = pd.requests ["a": prompt 40 generate 3]
  %hit = kv.match %new ["a": tokens 32]
  %kv = pd.prefill %hit
  %all = pd.join %kept, %kv : !pd.kv<3>, !pd.kv<1>
  %end = pd.decode %all
  kv.evict @i0 #pd.column<17, 42>
  kv.migrate @i0 #pd.column<5> from device to host
}

// -----

// Time-share: a step of the prompt, then steps of decodes; the plan says its mode, for the engine
// keeps the phases apart.
// CHECK: plan "shared/i0" round 0 instance i0 mode time-share steps 8 budget 16
// CHECK-NEXT: row "a" prompt 20 computed 0 blocks 2
// CHECK-NEXT: row "r" prompt 9 computed 9 blocks 1
// CHECK-NEXT: step 0: "a" [0, 16)
// CHECK-NEXT: step 5: "a" [16, 20) samples
// CHECK-NEXT: decode "a" from 6 until 22
// CHECK-NEXT: decode "r" from 0 until 14
// CHECK-NEXT: estimate us
// CHECK-NEXT: estimate tokens 16 1x4 4 2 1
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "torch" role both model @m {kv_blocks = 40, max_step_tokens = 16}
pd.graph @shared {mode = "time-share"} {
  %old = pd.resident on @i0 ["r": context 9 remaining 5]
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %all = pd.join %old, %kv
  %end = pd.decode %all
}

// -----

// KV that is still on its way is imported from where it comes, and decodes when it is there.
// CHECK: plan "arriving/d0" round 0 instance d0
// CHECK: import "r" from d0 tokens 9
// CHECK: decode "r" from 0 until 12
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @d0 on [@g0] engine "torch" role decode model @m {kv_blocks = 40}
pd.graph @arriving {
  %old = pd.resident on @d0 ["r": context 9 remaining 3 arriving]
  %end = pd.decode %old
}

// -----

// What assign-kv preempts leaves in the plan, and holds nothing.
// CHECK: plan "no_room/i0"
// CHECK-NEXT: row "r" prompt 30 computed 30 blocks 3
// CHECK-NEXT: row "s" prompt 0 computed 0 blocks 0
// CHECK-NEXT: preempt "s" recompute
// CHECK-NEXT: decode "r" from 0 until 35
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "torch" role both model @m {kv_blocks = 5}
pd.graph @no_room {
  %old = pd.resident on @i0 ["r": context 30 remaining 5, "s": context 40 remaining 5]
  %end = pd.decode %old
}

// -----

// An instance that computes nothing is still told what leaves it.
// CHECK: plan "only_leaves/i0" round 0 instance i0 mode hybrid steps 1
// CHECK: plan "only_leaves/i1" round 0 instance i1 mode hybrid steps 0 budget 512
// CHECK-NEXT: row "s" prompt 0 computed 0 blocks 0
// CHECK-NEXT: preempt "s" recompute
// CHECK-EMPTY:
// CHECK-NEXT: plan "only_leaves/i2" round 0 instance i2 mode hybrid steps 0
// CHECK-NEXT: evict 17
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "torch" role both model @m {kv_blocks = 40}
cluster.instance @i1 on [@g0] engine "torch" role both model @m {kv_blocks = 40}
cluster.instance @i2 on [@g0] engine "torch" role both model @m {kv_blocks = 40}
pd.graph @only_leaves {
  %old = pd.resident ["r": on @i0 context 9 remaining 1, "s": on @i1 context 9]
  %kept = pd.decide %old ["s": preempt]
  %end = pd.decode %kept
  kv.evict @i2 #pd.column<17>
}

// -----

// Whose first token is the last is done where its prompt is computed: no KV of it moves.
// CHECK: plan "one_token/p0"
// CHECK-NOT: export "a"
// CHECK: export "b" to d0 tokens 20
// CHECK: plan "one_token/d0"
// CHECK-NEXT: row "b" prompt 20 computed 0 blocks 2
// CHECK-NEXT: import "b" from p0 tokens 20
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "torch" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g0] engine "torch" role decode model @m {kv_blocks = 40}
pd.graph @one_token {
  %new = pd.requests ["a": prompt 9 generate 1, "b": prompt 20 generate 2]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// Whose turn it is not gets a plan of nothing: its residents keep their KV, also where it is full.
// CHECK: plan "turns/i1" round 0 instance i1 mode hybrid steps 0 budget 512
// CHECK-EMPTY:
// CHECK-NEXT: plan "turns/i0" round 0 instance i0 mode hybrid steps 2 budget 512
// CHECK-NEXT: row "r" prompt 9 computed 9 blocks 1
// CHECK-NEXT: decode "r" from 0 until 11
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "torch" role both model @m {kv_blocks = 40, pool = "shared"}
cluster.instance @i1 on [@g0] engine "torch" role both model @m {kv_blocks = 2, pool = "shared"}
pd.graph @turns {
  pd.turns ["i0": steps 2, "i1": steps 0]
  %old = pd.resident [
    "r": on @i0 context 9 remaining 7, "s": on @i1 context 16 remaining 9, "t": on @i1 context 16 remaining 9
  ]
  %end = pd.decode %old
}
