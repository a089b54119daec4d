// RUN: sagec opt -p "separate-phases" %s | filecheck %s
// RUN: sagec opt -p "separate-phases,separate-phases" %s | filecheck %s
// RUN: sagec opt -p "separate-phases{scheme=none}" %s | filecheck %s --check-prefix NONE
// RUN: sagec opt -p "separate-phases{scheme=af}" --verify-diagnostics %s | filecheck %s --check-prefix AF

// NONE-NOT: pd.phase
// AF: error: scheme=af parts the operators of a layer, and this graph has none
// AF: what separates requests is scheme=pd

cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}

// What is prefilled is handed over to the decodes; each phase says what it computes and holds.
// Prefill: 10 + 7 new tokens, of 10 + 9 in its KV. Decode: 4 and 3 more, and 5 of the resident.
// CHECK-LABEL: pd.graph @both
// CHECK: %kv = pd.phase prefill {compute_tokens = 17, kv_tokens = 19, kv_bytes = 4864} {
// CHECK-NEXT: %[[KV:.*]] = pd.prefill %new : !pd.kv<2>
// CHECK-NEXT: pd.yield %[[KV]] : !pd.kv<2>
// CHECK-NEXT: } : !pd.kv<2>
// CHECK-NEXT: %end = pd.phase decode {compute_tokens = 12, kv_tokens = 51, kv_bytes = 13056} {
// CHECK-NEXT: %all = pd.join %old, %kv : !pd.kv<1>, !pd.kv<2>
// CHECK-NEXT: %[[END:.*]] = pd.decode %all : !pd.kv<3>
// CHECK-NEXT: pd.yield %[[END]] : !pd.kv<3>
// CHECK-NEXT: } : !pd.kv<3>
// CHECK-NEXT: pd.yield %end : !pd.kv<3>
pd.graph @both {
  %old = pd.resident on @d0 ["r": context 20 remaining 5]
  %new = pd.requests ["a": prompt 10 generate 5, "b": prompt 9 computed 2 on @p0 generate 4]
  %kv = pd.prefill %new
  %all = pd.join %old, %kv
  %end = pd.decode %all
  pd.yield %end
}

// A horizon bounds what is decoded.
// CHECK-LABEL: pd.graph @horizon
// CHECK: pd.phase decode {compute_tokens = 4, kv_tokens = 24
pd.graph @horizon {horizon = 4} {
  %old = pd.resident on @d0 ["r": context 20]
  %end = pd.decode %old
}
