// RUN: sagec opt -p "serve" -t "plan{form=text}" --split-input-file %s | filecheck %s

// A pair: the prompt is computed and exported on one side, imported and decoded on the other.
// CHECK: plan "pair/p0" round 7 instance p0 mode strict steps 2 budget 16
// CHECK-NEXT: row "a" prompt 20 computed 0 blocks 2 deadline 900
// CHECK-NEXT: step 0: "a" [0, 16)
// CHECK-NEXT: step 1: "a" [16, 20) samples
// CHECK-NEXT: export "a" to d0 tokens 20
// CHECK-NEXT: estimate us
// CHECK-NEXT: estimate tokens 16 4
// CHECK-NEXT: estimate kv_blocks 2 2
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
