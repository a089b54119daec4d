// RUN: sagec opt -p "chunk-prefill{tokens=512}" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "chunk-prefill{tokens=512},chunk-prefill{tokens=64}" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "chunk-prefill" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix WHOLE
// RUN: sagec opt -p "chunk-prefill{tokens=-1}" --split-input-file --verify-diagnostics %s 2>&1 | filecheck %s --check-prefix LESS

// No chunk is longer than the bound; the last one is what is left.
// CHECK-LABEL: pd.graph @cut
// CHECK: pd.prefill %w bounds {{\[\[}}0, 512, 1024, 1100], [0, 512], [0, 17]]
// WHOLE-LABEL: pd.graph @cut
// WHOLE: pd.prefill %w bounds {{\[\[}}0, 1100], [0, 512], [0, 17]]
// LESS: error: chunk-prefill: tokens=-1; 0 (whole prompts) or more
pd.graph @cut {
  %w = pd.requests ["a": prompt 1100, "b": prompt 512, "c": prompt 17]
  %kv = pd.prefill %w
  pd.yield %kv
}

// A bound in the source wins, and a request's own over that of the prefill.
// CHECK-LABEL: pd.graph @bound_in_the_source_wins
// CHECK: pd.prefill %w chunk 64 bounds {{\[\[}}0, 64, 128, 150], [0, 100, 150]]
// WHOLE-LABEL: pd.graph @bound_in_the_source_wins
// WHOLE: pd.prefill %w chunk 64 bounds {{\[\[}}0, 64, 128, 150], [0, 100, 150]]
pd.graph @bound_in_the_source_wins {
  %w = pd.requests ["a": prompt 150, "b": prompt 150 chunk 100]
  %kv = pd.prefill %w chunk 64
  pd.yield %kv
}

// What has KV, computed or cached, is not computed again.
// CHECK-LABEL: pd.graph @what_is_there
// CHECK: pd.prefill %hit bounds {{\[\[}}640, 1100], [300, 600], [1023, 1024]]
pd.graph @what_is_there {
  %w = pd.requests ["a": prompt 1100, "b": prompt 600 computed 300, "c": prompt 1024]
  %hit = kv.match %w ["a": tokens 640, "c": tokens 1024]
  %kv = pd.prefill %hit
  pd.yield %kv
}

// Bounds that are written stay.
// CHECK-LABEL: pd.graph @written
// CHECK: pd.prefill %w bounds {{\[\[}}0, 5, 1100]]
pd.graph @written {
  %w = pd.requests ["a": prompt 1100]
  %kv = pd.prefill %w bounds [[0, 5, 1100]]
  pd.yield %kv
}

// Prefills in phases are cut too; no rows have no bounds.
// CHECK-LABEL: pd.graph @in_a_phase
// CHECK: pd.prefill %w bounds {{\[\[}}0, 512, 600]]
// CHECK: pd.prefill %none bounds []
pd.graph @in_a_phase {
  %w = pd.requests ["a": prompt 600]
  %none = pd.requests []
  %kv = pd.phase prefill {
    %0 = pd.prefill %w
    %1 = pd.prefill %none
    pd.yield %0
  } : !pd.kv<1>
  pd.yield %kv
}
