// RUN: sagec opt -p "apply-decision" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "apply-decision,apply-decision" --split-input-file --verify-diagnostics %s | filecheck %s

// The admitted go on in rank order; the others leave with their reason.
// CHECK-LABEL: pd.graph @by_rank
// CHECK-NEXT: pd.leave [
// CHECK-NEXT: "late": reject because "deadline passed",
// CHECK-NEXT: "big": defer because "no KV"
// CHECK: %go = pd.requests [
// CHECK-NEXT: "b": prompt 96 generate 64,
// CHECK-NEXT: "a": prompt 1024 generate 256
// CHECK-NEXT: ] : !pd.wave<2>
// CHECK-NEXT: %kv = pd.prefill %go : !pd.kv<2>
// CHECK-NEXT: %end = pd.decode %kv : !pd.kv<2>
// CHECK-NEXT: pd.yield %end : !pd.kv<2>
// CHECK-NOT: pd.decide
pd.graph @by_rank {
  %new = pd.requests [
    "a": prompt 1024 generate 256,
    "late": prompt 7 generate 1,
    "b": prompt 96 generate 64,
    "big": prompt 9000 generate 1
  ]
  %go = pd.decide %new [
    "b": admit rank 0,
    "a": admit rank 1 because "slack 166 ms",
    "late": reject because "deadline passed",
    "big": defer because "no KV"
  ]
  %kv = pd.prefill %go : !pd.kv<4>
  %end = pd.decode %kv
  pd.yield %end
}

// Without ranks the order is that of the decision; who is not named waits.
// CHECK-LABEL: pd.graph @without_ranks
// CHECK-NEXT: pd.leave [
// CHECK-NEXT: "b": defer because "the strategy did not decide"
// CHECK: %go = pd.requests [
// CHECK-NEXT: "c": prompt 3,
// CHECK-NEXT: "a": prompt 1
// CHECK-NEXT: ] : !pd.wave<2>
pd.graph @without_ranks {
  %new = pd.requests ["a": prompt 1, "b": prompt 2, "c": prompt 3]
  %go = pd.decide %new ["c": admit, "a": admit]
  %kv = pd.prefill %go
  pd.yield %kv
}

// What the strategy says of places and chunks holds; what it leaves open stays as it was asked.
// CHECK-LABEL: pd.graph @hints
// CHECK: %go = pd.requests [
// CHECK-NEXT: "a": prompt 100 chunk 32 on @p1 decode_on @d1,
// CHECK-NEXT: "b": prompt 200 chunk 64 on @p0
pd.graph @hints {
  %new = pd.requests ["a": prompt 100, "b": prompt 200 on @p0 chunk 64]
  %go = pd.decide %new ["a": admit prefill_on @p1 decode_on @d1 chunk 32, "b": admit]
  %kv = pd.prefill %go
  pd.yield %kv
}

// A prefix match below the decision goes into the admitted rows.
// CHECK-LABEL: pd.graph @matched
// CHECK: %go = pd.requests [
// CHECK-NEXT: "b": prompt 200 cached 128,
// CHECK-NEXT: "a": prompt 100
// CHECK-NOT: kv.match
pd.graph @matched {
  %new = pd.requests ["a": prompt 100, "b": prompt 200]
  %hit = kv.match %new ["b": tokens 128]
  %go = pd.decide %hit ["b": admit rank 0, "a": admit rank 1]
  %kv = pd.prefill %go
  pd.yield %kv
}

// What single instances have stays a match, of the admitted: where they go is still open.
// CHECK-LABEL: pd.graph @matched_on_instances
// CHECK: %[[GO:.*]] = pd.requests [
// CHECK-NEXT: "b": prompt 200 cached 16,
// CHECK-NEXT: "a": prompt 100
// CHECK-NEXT: ] : !pd.wave<2>
// CHECK-NEXT: %[[HIT:.*]] = kv.match %[[GO]] [
// CHECK-NEXT: "b": tokens 128 on @p1,
// CHECK-NEXT: "a": tokens 64 on @p0,
// CHECK-NEXT: "a": tokens 32 on @p1
// CHECK-NEXT: ] : !pd.wave<2>
// CHECK-NEXT: pd.prefill %[[HIT]]
pd.graph @matched_on_instances {
  %new = pd.requests ["a": prompt 100, "b": prompt 200, "c": prompt 300]
  %hit = kv.match %new ["a": tokens 64 on @p0, "a": tokens 32 on @p1, "b": tokens 128 on @p1,
    "c": tokens 256 on @p0, "b": tokens 16]
  %go = pd.decide %hit ["b": admit rank 0, "a": admit rank 1, "c": defer because "no KV"]
  %kv = pd.prefill %go
  pd.yield %kv
}

// A wave that is admitted as it stands keeps its match.
// CHECK-LABEL: pd.graph @all_admitted_with_their_match
// CHECK: %go = kv.match %{{.*}} on @p0
// CHECK-NOT: pd.decide
// CHECK: pd.prefill %go
pd.graph @all_admitted_with_their_match {
  %new = pd.requests ["a": prompt 100, "b": prompt 200]
  %hit = kv.match %new on @p0 ["b": tokens 64]
  %go = pd.decide %hit ["a": admit rank 0, "b": admit rank 1]
  %kv = pd.prefill %go
  pd.yield %kv
}

// Nobody is admitted: the wave is empty, and so is all that is made of it.
// CHECK-LABEL: pd.graph @nobody
// CHECK: %go = pd.requests [] : !pd.wave<0>
// CHECK-NEXT: %kv = pd.prefill %go : !pd.kv<0>
// CHECK-NEXT: %all = pd.join %old, %kv : !pd.kv<1>, !pd.kv<0>
// CHECK-NEXT: %end = pd.decode %all : !pd.kv<1>
pd.graph @nobody {
  %old = pd.resident on @d0 ["r": context 10]
  %new = pd.requests ["a": prompt 1, "b": prompt 2]
  %go = pd.decide %new ["a": defer, "b": defer]
  %kv = pd.prefill %go : !pd.kv<2>
  %all = pd.join %old, %kv : !pd.kv<1>, !pd.kv<2>
  %end = pd.decode %all : !pd.kv<3>
  pd.yield %end : !pd.kv<3>
}

// Residents that are preempted lose their KV, by recomputation or to the host.
// CHECK-LABEL: pd.graph @residents
// CHECK: %kept = pd.preempt %old [
// CHECK-NEXT: "r": preempt on @d0 because "KV",
// CHECK-NEXT: "t": swap on @d1
// CHECK-NEXT: ] : !pd.kv<3>
// CHECK-NEXT: %end = pd.decode %kept : !pd.kv<1>
pd.graph @residents {
  %old = pd.resident ["r": context 10 on @d0, "s": context 20 on @d0, "t": context 30 on @d1]
  %kept = pd.decide %old ["r": preempt because "KV", "s": admit, "t": swap]
  %end = pd.decode %kept
  pd.yield %end
}

// Where no resident is preempted, nothing is written.
// CHECK-LABEL: pd.graph @all_stay
// CHECK-NEXT: %old = pd.resident
// CHECK-NOT: pd.preempt
// CHECK: pd.decode %old
pd.graph @all_stay {
  %old = pd.resident on @d0 ["r": context 10]
  %kept = pd.decide %old ["r": admit]
  %end = pd.decode %kept
  pd.yield %end
}

// A decision in a phase, and the phase's type with it.
// CHECK-LABEL: pd.graph @in_a_phase
// CHECK: pd.yield %{{.*}} : !pd.kv<1>
// CHECK-NEXT: } : !pd.kv<1>
// CHECK-NEXT: pd.yield %kv : !pd.kv<1>
pd.graph @in_a_phase {
  %new = pd.requests ["a": prompt 1, "b": prompt 2]
  %go = pd.decide %new ["a": admit]
  %kv = pd.phase prefill {
    %0 = pd.prefill %go
    pd.yield %0
  } : !pd.kv<2>
  pd.yield %kv
}

// -----

// Rows that do not exist.
// CHECK: error: pd.decide: no request "x" in !pd.wave<2>
// CHECK: there are: a, b

pd.graph @no_such_row {
  %new = pd.requests ["a": prompt 1, "b": prompt 2]
  %go = pd.decide %new ["x": admit]
  %kv = pd.prefill %go
  pd.yield %kv
}

// -----

// Ranks that do not exist, and ranks that two rows have.
// CHECK: error: "b" has rank 7, which does not exist
// CHECK: the ranks of 2 admitted rows are 0 to 1

pd.graph @no_such_rank {
  %new = pd.requests ["a": prompt 1, "b": prompt 2]
  %go = pd.decide %new ["a": admit rank 0, "b": admit rank 7]
  %kv = pd.prefill %go
  pd.yield %kv
}

// -----

// CHECK: error: "b" has rank 0, which another row has too
// CHECK: the ranks of 2 admitted rows are 0 to 1

pd.graph @rank_twice {
  %new = pd.requests ["a": prompt 1, "b": prompt 2]
  %go = pd.decide %new ["a": admit rank 0, "b": admit rank 0]
  %kv = pd.prefill %go
  pd.yield %kv
}

// -----

// CHECK: error: rows are decided twice
// CHECK: one pd.decide a wave

pd.graph @decided_twice {
  %new = pd.requests ["a": prompt 1, "b": prompt 2]
  %again = pd.decide %go ["a": admit] : !pd.wave<2>
  %go = pd.decide %new ["a": admit, "b": admit]
  %kv = pd.prefill %again
  pd.yield %kv
}

// -----

// CHECK: error: rows are decided twice
// CHECK: one pd.decide a wave

pd.graph @decided_beside_each_other {
  %new = pd.requests ["a": prompt 1, "b": prompt 2]
  %go = pd.decide %new ["a": admit]
  %too = pd.decide %new ["b": admit]
  %kv = pd.prefill %go
  %other = pd.prefill %too
  pd.yield %kv
}

// -----

// CHECK: error: pd.decide of what pd.join gives
// CHECK: decide what pd.requests brings

pd.graph @decided_too_late {
  %old = pd.resident on @d0 ["r": context 10]
  %all = pd.join %old
  %go = pd.decide %all ["r": preempt]
  pd.yield %go
}

// -----

// Who waits has nothing to preempt, who decodes is not deferred.
// CHECK: error: "b" waits and holds no KV to preempt
// CHECK: admit, defer or reject it

pd.graph @preempt_waiting {
  %new = pd.requests ["a": prompt 1, "b": prompt 2]
  %go = pd.decide %new ["a": admit, "b": preempt]
  pd.yield
}

// -----

// CHECK: error: "r" decodes already
// CHECK: what it can be is admit, preempt or swap

pd.graph @defer_resident {
  %old = pd.resident on @d0 ["r": context 10]
  %go = pd.decide %old ["r": defer]
  pd.yield
}
