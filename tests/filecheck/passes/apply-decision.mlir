// RUN: sagec opt -p "apply-decision" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "apply-decision,apply-decision" --split-input-file --verify-diagnostics %s | filecheck %s

// The admitted go on in rank order; the others leave, with the reason, in the order of the wave.
// CHECK-LABEL: pd.graph @ranks
// CHECK-NEXT: pd.leave [
// CHECK-NEXT: "b": defer because "no KV",
// CHECK-NEXT: "d": reject because "too long",
// CHECK-NEXT: "e": defer because "the strategy did not decide"
// CHECK-NEXT: ]
// CHECK-NEXT: %go = pd.requests [
// CHECK-NEXT: "c": prompt 3 generate 30,
// CHECK-NEXT: "a": prompt 1 generate 10 tenant "blue"
// CHECK-NEXT: ] : !pd.wave<2>
// CHECK-NEXT: %kv = pd.prefill %go : !pd.kv<2>
// CHECK-NEXT: %end = pd.decode %kv : !pd.kv<2>
pd.graph @ranks {
  %new = pd.requests [
    "a": prompt 1 generate 10 tenant "blue",
    "b": prompt 2 generate 20,
    "c": prompt 3 generate 30,
    "d": prompt 4,
    "e": prompt 5
  ]
  %go = pd.decide %new [
    "d": reject because "too long",
    "a": admit rank 1,
    "c": admit rank 0,
    "b": defer because "no KV"
  ]
  %kv = pd.prefill %go
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Where everybody is admitted as they came, the wave is what was asked.
// CHECK-LABEL: pd.graph @all
// CHECK-NEXT: %[[WAVE:.*]] = pd.requests [
// CHECK-NEXT: "a": prompt 1,
// CHECK-NEXT: "b": prompt 2
// CHECK-NEXT: ] : !pd.wave<2>
// CHECK-NEXT: %kv = pd.prefill %[[WAVE]] : !pd.kv<2>
pd.graph @all {
  %new = pd.requests ["a": prompt 1, "b": prompt 2]
  %go = pd.decide %new ["a": admit rank 0, "b": admit rank 1]
  %kv = pd.prefill %go
}

// -----

// Instances and chunk bounds that the strategy asks for become the requests' own.
// CHECK-LABEL: pd.graph @hints
// CHECK: "a": prompt 100 chunk 16 on @p1 decode_on @d0,
// CHECK-NEXT: "b": prompt 100 chunk 32
pd.graph @hints {
  %new = pd.requests ["a": prompt 100, "b": prompt 100 chunk 32]
  %go = pd.decide %new ["a": admit rank 0 prefill_on @p1 decode_on @d0 chunk 16, "b": admit rank 1]
  %kv = pd.prefill %go
}

// -----

// Nobody is admitted: the graph goes on, of nothing.
// CHECK-LABEL: pd.graph @none
// CHECK: %kv = pd.prefill %{{.*}} : !pd.kv<0>
pd.graph @none {
  %new = pd.requests ["a": prompt 1]
  %go = pd.decide %new ["a": defer because "later"]
  %kv = pd.prefill %go
}

// -----

// Residents that are preempted lose their place; those that are not named go on.
// CHECK-LABEL: pd.graph @preempted
// CHECK: %kept = pd.preempt %old [
// CHECK-NEXT: "b": preempt on @d0 because "KV is short"
// CHECK-NEXT: "c": swap on @d1
// CHECK: %end = pd.decode %kept : !pd.kv<1>
pd.graph @preempted {
  %old = pd.resident ["a": on @d0 context 9, "b": on @d0 context 9, "c": on @d1 context 9]
  %kept = pd.decide %old ["b": preempt because "KV is short", "c": swap]
  %end = pd.decode %kept
}

// -----

// CHECK: error: pd.decide: no request "z"
// CHECK: there are: a
pd.graph @unknown_row {
  %new = pd.requests ["a": prompt 1]
  %go = pd.decide %new ["z": admit]
}

// -----

// CHECK: error: "b" has rank 2, which does not exist
// CHECK: the ranks of 2 admitted rows are 0 to 1
pd.graph @unknown_rank {
  %new = pd.requests ["a": prompt 1, "b": prompt 1]
  %go = pd.decide %new ["a": admit rank 0, "b": admit rank 2]
}

// -----

// CHECK: error: "b" has rank 1, which another row has too
pd.graph @same_rank {
  %new = pd.requests ["a": prompt 1, "b": prompt 1]
  %go = pd.decide %new ["a": admit rank 1, "b": admit rank 1]
}

// -----

// CHECK: error: rows are decided twice
// CHECK: one pd.decide a wave
pd.graph @twice {
  %new = pd.requests ["a": prompt 1]
  %one = pd.decide %new ["a": admit]
  %two = pd.decide %one ["a": admit]
}

// -----

// CHECK: error: rows are decided twice
pd.graph @beside_each_other {
  %new = pd.requests ["a": prompt 1, "b": prompt 1]
  %one = pd.decide %new ["a": admit]
  %two = pd.decide %new ["b": admit]
}

// -----

// CHECK: error: "a" waits and holds no KV to preempt
// CHECK: admit, defer or reject it
pd.graph @nothing_to_preempt {
  %new = pd.requests ["a": prompt 1]
  %go = pd.decide %new ["a": preempt]
}

// -----

// CHECK: error: "a" decodes already
// CHECK: what it can be is admit, preempt or swap
pd.graph @decodes_already {
  %old = pd.resident on @d0 ["a": context 1]
  %go = pd.decide %old ["a": reject]
}
