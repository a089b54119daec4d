// RUN: sagec opt -p "separate-phases" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "separate-phases{scheme=pd}" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "separate-phases,separate-phases" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "separate-phases{scheme=none}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix NONE
// RUN: sagec opt -p "separate-phases{scheme=af}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix AF

// Prefills in one sub-graph, decodes and what they join in the other, each with what it needs: the
// prompts' 120 tokens to compute and to keep; 3 and 7 tokens to decode, for the first of each
// request comes from its prefill. A token of KV is 2 x 2 layers x 2 heads x 16 x 2 bytes.
// CHECK-LABEL: pd.graph @both
// CHECK: %new = pd.requests
// CHECK: %kv = pd.phase prefill {compute_tokens = 120, kv_tokens = 120, kv_bytes = 30720} {
// CHECK-NEXT: %[[K:.*]] = pd.prefill %new : !pd.kv<2>
// CHECK-NEXT: pd.yield %[[K]] : !pd.kv<2>
// CHECK-NEXT: } : !pd.kv<2>
// CHECK: %end = pd.phase decode {compute_tokens = 15, kv_tokens = 145, kv_bytes = 37120} {
// CHECK-NEXT: %all = pd.join %old, %kv
// CHECK-NEXT: %[[E:.*]] = pd.decode %all : !pd.kv<3>
// CHECK-NEXT: pd.yield %[[E]] : !pd.kv<3>
// CHECK-NEXT: } : !pd.kv<3>
// CHECK-NEXT: pd.yield %end : !pd.kv<3>

// What is written as phases stays, and so does everything with scheme=none.
// NONE-LABEL: pd.graph @both
// NONE-NOT: pd.phase
// NONE: pd.graph @nothing

// Parting attention from feed-forward is for operators, which a graph of requests has not.
// AF: error: scheme=af parts the operators of a layer, and this graph has none
// AF: what separates requests is scheme=pd

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 128, vocab = 256}
pd.graph @both {
  %new = pd.requests ["a": prompt 100 generate 4, "b": prompt 20 generate 8]
  %old = pd.resident on @d0 ["r": context 10 remaining 5]
  %kv = pd.prefill %new
  %all = pd.join %old, %kv
  %end = pd.decode %all
  pd.yield %end
}

// Only what is not computed and not cached is counted, and only to the horizon.
// CHECK-LABEL: pd.graph @horizon
// CHECK: pd.phase prefill {compute_tokens = 20, kv_tokens = 100, kv_bytes = 25600}
// CHECK: pd.phase decode {compute_tokens = 16, kv_tokens = 116, kv_bytes = 29696}
pd.graph @horizon {horizon = 16} {
  %new = pd.requests ["a": prompt 100 computed 48 cached 32]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// A graph of one phase has one sub-graph; one without requests none.
// CHECK-LABEL: pd.graph @decodes_only
// CHECK-NOT: pd.phase prefill
// CHECK: pd.phase decode
// CHECK-LABEL: pd.graph @nothing
// CHECK-NEXT: pd.yield
pd.graph @decodes_only {
  %old = pd.resident on @d0 ["r": context 10 remaining 5]
  %end = pd.decode %old
  pd.yield %end
}
pd.graph @nothing {}

// -----

// Several models: KV has no size that holds for all.
// CHECK-LABEL: pd.graph @models
// CHECK: pd.phase prefill {compute_tokens = 5, kv_tokens = 5, kv_bytes = 0}

cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 128, vocab = 256}
cluster.model @tall like @tiny {layers = 8}
pd.graph @models {
  %new = pd.requests ["a": prompt 5 model @tall]
  %kv = pd.prefill %new
  pd.yield %kv
}

// -----

// A preemption between a join and its decode goes with them; outside, it would need the phase and
// the phase it.
// CHECK-LABEL: pd.graph @preempts
// CHECK: %end = pd.phase decode {compute_tokens = 5, kv_tokens = 15
// CHECK-NEXT: %all = pd.join %old : !pd.kv<2>
// CHECK-NEXT: %kept = pd.preempt %all [
// CHECK: pd.decode %kept : !pd.kv<1>

pd.graph @preempts {
  %old = pd.resident on @d0 ["r": context 10 remaining 5, "s": context 10 remaining 5]
  %all = pd.join %old
  %kept = pd.preempt %all ["s": preempt on @d0]
  %end = pd.decode %kept
  pd.yield %end
}
