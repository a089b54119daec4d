// RUN: sagec opt -p "chunk-prefill{tokens=512}" %s | filecheck %s
// RUN: sagec opt -p "chunk-prefill{tokens=512},chunk-prefill{tokens=64}" %s | filecheck %s
// RUN: sagec opt -p "chunk-prefill" %s | filecheck %s --check-prefix WHOLE
// RUN: sagec opt -p "chunk-prefill{tokens=-1}" --verify-diagnostics %s | filecheck %s --check-prefix NEGATIVE

// NEGATIVE: error: chunk-prefill: tokens=-1
// NEGATIVE: 0 (whole prompts) or more

// Chunks follow each other from the first token to the last.
// CHECK-LABEL: pd.graph @chunks
// CHECK: pd.prefill %new bounds {{\[\[}}0, 512, 1024, 1100], [0, 512], [0, 7]] : !pd.kv<3>
// WHOLE-LABEL: pd.graph @chunks
// WHOLE: pd.prefill %new bounds {{\[\[}}0, 1100], [0, 512], [0, 7]] : !pd.kv<3>
pd.graph @chunks {
  %new = pd.requests ["a": prompt 1100, "b": prompt 512, "c": prompt 7]
  %kv = pd.prefill %new
}

// What has KV already is not computed again.
// CHECK-LABEL: pd.graph @started
// CHECK: bounds {{\[\[}}100, 612, 1100], [64, 96]]
pd.graph @started {
  %new = pd.requests ["a": prompt 1100 computed 100 on @p0, "b": prompt 96]
  %hit = kv.match %new ["b": tokens 64]
  %kv = pd.prefill %hit
}

// A bound in the source wins: that of the op, and before it that of the request.
// CHECK-LABEL: pd.graph @bound_in_the_source_wins
// CHECK: pd.prefill %new chunk 40 bounds {{\[\[}}0, 40, 80, 100], [0, 60, 100]]
pd.graph @bound_in_the_source_wins {
  %new = pd.requests ["a": prompt 100, "b": prompt 100 chunk 60]
  %kv = pd.prefill %new chunk 40
}

// Bounds that are there stay.
// CHECK-LABEL: pd.graph @said
// CHECK: bounds {{\[\[}}0, 1, 9]]
pd.graph @said {
  %new = pd.requests ["a": prompt 9]
  %kv = pd.prefill %new bounds [[0, 1, 9]] : !pd.kv<1>
}
