// RUN: sagec opt -p "match-prefix" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "match-prefix,match-prefix" --split-input-file --verify-diagnostics %s | filecheck %s

// What the instance has that computes the prompt is taken from it; what others have is dropped.
// CHECK-LABEL: pd.graph @where_it_goes
// CHECK-NEXT: %hit = pd.requests [
// CHECK-NEXT: "a": prompt 100 cached 32,
// CHECK-NEXT: "b": prompt 96 generate 64,
// CHECK-NEXT: "c": prompt 50
// CHECK-NEXT: ] : !pd.wave<3>
// CHECK-NEXT: pd.prefill %hit on [@p1, @p0, @p0]
// CHECK-NOT: kv.match
cluster.model @m {layers = 32, hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, ffn = 14336, vocab = 128000}
cluster.device @g0 {flops_per_s = 9.9e14, bytes_per_s = 4.8e12}
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.link @g0 to @g2 {bytes_per_s = 4.5e11}
cluster.link @g1 to @g2 {bytes_per_s = 4.5e11}
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 4000}
cluster.instance @p1 on [@g1] engine "sim" role prefill model @m {kv_blocks = 4000}
cluster.instance @d0 on [@g2] engine "sim" role decode model @m {kv_blocks = 4000}
pd.graph @where_it_goes {
  %new = pd.requests ["a": prompt 100, "b": prompt 96 generate 64, "c": prompt 50]
  %hit = kv.match %new ["a": tokens 64 on @p0, "a": tokens 32 on @p1, "b": tokens 64 on @p1]
  %kv = pd.prefill %hit on [@p1, @p0, @p0]
  pd.yield %kv
}

// A match that names no instance holds on all of them; the last token is computed in any case.
// CHECK-LABEL: pd.graph @anywhere
// CHECK: "a": prompt 100 cached 16,
// CHECK-NEXT: "b": prompt 64 cached 63
// CHECK-NOT: kv.match
pd.graph @anywhere {
  %new = pd.requests ["a": prompt 100, "b": prompt 64]
  %more = kv.match %new on @p0 ["b": tokens 80]
  %hit = kv.match %more ["a": tokens 16, "b": tokens 32]
  %kv = pd.prefill %hit on @p0
  pd.yield %kv
}

// A graph without matches stays as it is.
// CHECK-LABEL: pd.graph @nothing_matched
// CHECK-NEXT: pd.requests [
// CHECK-NEXT: "a": prompt 100 cached 16
// CHECK-NEXT: ]
// CHECK-NEXT: pd.prefill
pd.graph @nothing_matched {
  %new = pd.requests ["a": prompt 100 cached 16]
  %kv = pd.prefill %new on @p0
  pd.yield %kv
}

// -----

// CHECK: error: "a" is matched and has no place
// CHECK: run select-device first, or say `on`
pd.graph @no_place {
  %new = pd.requests ["a": prompt 100]
  %hit = kv.match %new on @p0 ["a": tokens 64]
  %kv = pd.prefill %hit
  pd.yield %kv
}

// -----

// CHECK: error: kv.match of what pd.decide gives
// CHECK: run apply-decision first
pd.graph @undecided {
  %new = pd.requests ["a": prompt 100]
  %go = pd.decide %new ["a": admit]
  %hit = kv.match %go on @p0 ["a": tokens 64]
  %kv = pd.prefill %hit on @p0
  pd.yield %kv
}
