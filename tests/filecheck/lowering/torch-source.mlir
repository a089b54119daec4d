// RUN: sagec opt -t torch --split-input-file %s | filecheck %s

// A line an operator. Layers that read alike become a loop, whose first round adds nothing to the
// stream; the last norm takes the rows that sample; KV is stored before it is attended to; sampling
// is the engine's.
// CHECK: # sagec torch program 1 sha256 {{[0-9a-f]+}}
// CHECK-NEXT: """Steps of model m, generated from exec graphs; not to be edited.
// CHECK: SHAPE = {
// CHECK-NEXT:     "tp": 1,
// CHECK-NEXT:     "pp": 1,
// CHECK-NEXT:     "dp": 1,
// CHECK-NEXT:     "hidden": 8,
// CHECK-NEXT:     "heads": 2,
// CHECK-NEXT:     "kv_heads": 1,
// CHECK-NEXT:     "head_dim": 4,
// CHECK-NEXT:     "layers": 2,
// CHECK-NEXT:     "ffn": 16,
// CHECK-NEXT:     "vocab": 10,
// CHECK-NEXT: }
// CHECK: def decode(weights, kernels, kv, batch, ranks):
// CHECK-NEXT:     """Logits [S, vocab] of a step; from exec.graph @looped of 3 tokens."""
// CHECK-NEXT:     kernels.begin_step(batch)
// CHECK-NEXT:     # embedding [T, 8], 1.5 us
// CHECK-NEXT:     stream = F.embedding(batch.tokens, weights.embedding)
// CHECK-NEXT:     ffn = None
// CHECK-NEXT:     for layer, cache in zip(weights.layers, kv, strict=True):
// CHECK-NEXT:         # norm [T, 8]
// CHECK-NEXT:         normed = kernels.add_norm(stream, ffn, layer.norm)
// CHECK-NEXT:         del ffn
// CHECK-NEXT:         # qkv [T, 16]
// CHECK-NEXT:         qkv = layer.qkv(normed)
// CHECK-NEXT:         del normed
// CHECK-NEXT:         # kv_store
// CHECK-NEXT:         kernels.store_kv(qkv, cache, batch, layer)
// CHECK-NEXT:         attended = kernels.empty_attended(qkv)
// CHECK-NEXT:         # decode_attention [T, 8]
// CHECK-NEXT:         kernels.attend_tokens(qkv, cache, batch, attended)
// CHECK-NEXT:         del qkv
// CHECK-NEXT:         # projection [T, 8]
// CHECK-NEXT:         added = layer.output(attended)
// CHECK-NEXT:         del attended
// CHECK-NEXT:         # norm [T, 8]
// CHECK-NEXT:         normed = kernels.add_norm(stream, added, layer.ffn_norm)
// CHECK-NEXT:         del added
// CHECK-NEXT:         # ffn [T, 8]
// CHECK-NEXT:         ffn = layer.ffn.down(kernels.silu_multiply(layer.ffn.gate_up(normed)))
// CHECK-NEXT:         del normed
// CHECK-NEXT:     # norm [S, 8]
// CHECK-NEXT:     normed = kernels.add_norm(stream[batch.sampled], ffn[batch.sampled], weights.norm)
// CHECK-NEXT:     del stream, ffn
// CHECK-NEXT:     # lm_head [S, 10]
// CHECK-NEXT:     logits = weights.lm_head(normed)
// CHECK-NEXT:     del normed
// CHECK-NEXT:     return logits
exec.graph @looped {phase = "decode", model = "m"} {
  %ids = exec.input -> !exec.tensor<[3], i32, @g0>
  %stream = exec.embedding %ids {time_us = 1.5} -> !exec.tensor<[3, 8], f32, @g0>
  %normed_1, %s1 = exec.norm %stream {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 8], f32, @g0>
  %qkv1 = exec.qkv %normed_1 {layer = 0, heads = 2, kv_heads = 1, head_dim = 4} -> !exec.tensor<[3, 16], f32, @g0>
  %kv1 = exec.kv_load {layer = 0} -> !exec.tensor<[9, 2, 1, 4], f32, @g0>
  %attended1, %new1 = exec.decode_attention %qkv1, %kv1 {layer = 0, heads = 2, kv_heads = 1, head_dim = 4} context #pd.column<4, 2, 3> -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 2, 1, 4], f32, @g0>
  exec.kv_store %new1 {layer = 0}
  %added1 = exec.projection %attended1 {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>
  %normed_3, %t1 = exec.norm %s1, %added1 {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 8], f32, @g0>
  %ffn1 = exec.ffn %normed_3 {layer = 0, width = 16} -> !exec.tensor<[3, 8], f32, @g0>
  %normed_2, %s2 = exec.norm %t1, %ffn1 {layer = 1} -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 8], f32, @g0>
  %qkv2 = exec.qkv %normed_2 {layer = 1, heads = 2, kv_heads = 1, head_dim = 4} -> !exec.tensor<[3, 16], f32, @g0>
  %kv2 = exec.kv_load {layer = 1} -> !exec.tensor<[9, 2, 1, 4], f32, @g0>
  %attended2, %new2 = exec.decode_attention %qkv2, %kv2 {layer = 1, heads = 2, kv_heads = 1, head_dim = 4} context #pd.column<4, 2, 3> -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 2, 1, 4], f32, @g0>
  exec.kv_store %new2 {layer = 1}
  %added2 = exec.projection %attended2 {layer = 1} -> !exec.tensor<[3, 8], f32, @g0>
  %normed_4, %t2 = exec.norm %s2, %added2 {layer = 1} -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 8], f32, @g0>
  %ffn2 = exec.ffn %normed_4 {layer = 1, width = 16} -> !exec.tensor<[3, 8], f32, @g0>
  %normed, %last = exec.norm %t2, %ffn2 -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 8], f32, @g0>
  %logits = exec.lm_head %normed rows #pd.column<0, 1, 2> -> !exec.tensor<[3, 10], f32, @g0>
  %tokens = exec.sample %logits -> !exec.tensor<[3], i32, @g0>
  exec.yield %tokens
}

// -----

// Two ranks: sums and logits are exchanged; a message on its stream begins, and ends where somebody
// waits for it. A chunk and a decode attend into one tensor. One layer alone is no loop.
// CHECK: "tp": 2,
// CHECK: def hybrid(weights, kernels, kv, batch, ranks):
// CHECK: layer, cache = weights.layers[0], kv[0]
// CHECK-NEXT: # norm [T, 8]
// CHECK-NEXT: normed = kernels.add_norm(hidden, None, layer.norm)
// CHECK: attended = kernels.empty_attended(qkv)
// CHECK-NEXT: # prefill_attention [2, 8]
// CHECK-NEXT: kernels.attend_chunks(qkv, cache, batch, attended)
// CHECK-NEXT: # decode_attention [1, 8]
// CHECK-NEXT: kernels.attend_tokens(qkv, cache, batch, attended)
// CHECK-NEXT: del qkv
// CHECK-NEXT: # projection [T, 8]
// CHECK-NEXT: added = layer.output(attended)
// CHECK-NEXT: del attended
// CHECK-NEXT: # all_reduce [T, 8], 9 us
// CHECK-NEXT: work = ranks.begin_all_reduce([added])
// CHECK-NEXT: work.wait()
// CHECK-NEXT: del work
// CHECK-NEXT: # norm [T, 8]
// CHECK-NEXT: normed = kernels.add_norm(hidden, added, layer.ffn_norm)
// CHECK: added = layer.ffn.down(kernels.silu_multiply(layer.ffn.gate_up(normed)))
// CHECK-NEXT: del normed
// CHECK-NEXT: # all_reduce [T, 8]
// CHECK-NEXT: ranks.all_reduce([added])
// CHECK: # lm_head [S, 5]
// CHECK-NEXT: logits = weights.lm_head(normed)
// CHECK-NEXT: del normed
// CHECK-NEXT: # all_gather [S, 10]
// CHECK-NEXT: logits = ranks.all_gather(logits, 1)
// CHECK-NEXT: return logits
exec.graph @of_two_ranks {phase = "hybrid", model = "m", tp = 2} {
  %0 = exec.input -> !exec.tensor<[3], i32, @g0>
  %1 = exec.embedding %0 -> !exec.tensor<[3, 8], f32, @g0>
  %2, %3 = exec.norm %1 {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 8], f32, @g0>
  %4 = exec.qkv %2 {layer = 0, heads = 2, kv_heads = 1, head_dim = 4} -> !exec.tensor<[3, 16], f32, @g0>
  %5 = exec.kv_load {layer = 0} -> !exec.tensor<[0, 2, 1, 4], f32, @g0>
  %6, %7 = exec.prefill_attention %4, %5 {layer = 0, heads = 2, kv_heads = 1, head_dim = 4} begin #pd.column<0> end #pd.column<2> -> !exec.tensor<[2, 8], f32, @g0>, !exec.tensor<[2, 2, 1, 4], f32, @g0>
  exec.kv_store %7 {layer = 0}
  %8 = exec.kv_load {layer = 0} -> !exec.tensor<[5, 2, 1, 4], f32, @g0>
  %9, %10 = exec.decode_attention %4, %8 {layer = 0, heads = 2, kv_heads = 1, head_dim = 4, first = 2} context #pd.column<5> -> !exec.tensor<[1, 8], f32, @g0>, !exec.tensor<[1, 2, 1, 4], f32, @g0>
  exec.kv_store %10 {layer = 0}
  %11 = exec.projection %6, %9 {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>
  %12 = exec.wait %11 {stream = "comm", layer = 0} -> !exec.tensor<[3, 8], f32, @g0>
  %13 = exec.all_reduce %12 {stream = "comm", layer = 0, time_us = 9.0} over [@g0, @g1] -> !exec.tensor<[3, 8], f32, @g0>
  %14 = exec.wait %13 {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>
  %15, %16 = exec.norm %3, %14 {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 8], f32, @g0>
  %17 = exec.ffn %15 {layer = 0, width = 8} -> !exec.tensor<[3, 8], f32, @g0>
  %18 = exec.all_reduce %17 {layer = 0} over [@g0, @g1] -> !exec.tensor<[3, 8], f32, @g0>
  %19, %20 = exec.norm %16, %18 -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 8], f32, @g0>
  %21 = exec.lm_head %19 rows #pd.column<1, 2> -> !exec.tensor<[2, 5], f32, @g0>
  %22 = exec.all_gather %21 {axis = 1} over [@g0, @g1] -> !exec.tensor<[2, 10], f32, @g0>
  %23 = exec.sample %22 -> !exec.tensor<[2], i32, @g0>
  exec.yield %23
}

// -----

// Who still needs a value as it was gets a clone of it before another writes in place; slices are
// batches of whole requests, and a concat puts them together again.
// CHECK: def decode(weights, kernels, kv, batch, ranks):
// CHECK-NEXT: """
// CHECK-NEXT: batch_0, batch_1 = lanes_of(batch, 2)
// CHECK: attended = kernels.empty_attended(qkv)
// CHECK: added = layer.output(attended)
// CHECK-NEXT: del attended
// CHECK-NEXT: clone = hidden.clone()
// CHECK-NEXT: # norm [T, 8]
// CHECK-NEXT: normed = kernels.add_norm(clone, added, layer.ffn_norm)
// CHECK-NEXT: del added
// CHECK-NEXT: # slice [T0, 8]
// CHECK-NEXT: part = normed[: len(batch_0.tokens)]
// CHECK-NEXT: # slice [T1, 8]
// CHECK-NEXT: part_2 = normed[len(batch_0.tokens) :]
// CHECK: whole = torch.cat([added, added_2])
// CHECK-NEXT: # norm [T, 8]
// CHECK-NEXT: normed = kernels.add_norm(hidden, whole, weights.norm)
// CHECK-NEXT: del whole
// CHECK-NEXT: # lm_head [S, 10]
// CHECK-NEXT: logits = weights.lm_head(normed[batch.sampled])
exec.graph @cut {phase = "decode", model = "m"} {
  %0 = exec.input -> !exec.tensor<[3], i32, @g0>
  %1 = exec.embedding %0 -> !exec.tensor<[3, 8], f32, @g0>
  %2, %3 = exec.norm %1 {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 8], f32, @g0>
  %4 = exec.qkv %2 {layer = 0, heads = 2, kv_heads = 1, head_dim = 4} -> !exec.tensor<[3, 16], f32, @g0>
  %5 = exec.kv_load {layer = 0} -> !exec.tensor<[9, 2, 1, 4], f32, @g0>
  %6, %7 = exec.decode_attention %4, %5 {layer = 0, heads = 2, kv_heads = 1, head_dim = 4} context #pd.column<4, 2, 3> -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 2, 1, 4], f32, @g0>
  exec.kv_store %7 {layer = 0}
  %8 = exec.projection %6 {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>
  %9, %10 = exec.norm %3, %8 {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 8], f32, @g0>
  %11 = exec.slice %9 {layer = 0} -> !exec.tensor<[1, 8], f32, @g0>
  %12 = exec.slice %9 {layer = 0, first = 1} -> !exec.tensor<[2, 8], f32, @g0>
  %13 = exec.ffn %11 {layer = 0, width = 16} -> !exec.tensor<[1, 8], f32, @g0>
  %14 = exec.ffn %12 {layer = 0, width = 16} -> !exec.tensor<[2, 8], f32, @g0>
  %15 = exec.concat %13, %14 {layer = 0} -> !exec.tensor<[3, 8], f32, @g0>
  %16, %17 = exec.norm %3, %15 -> !exec.tensor<[3, 8], f32, @g0>, !exec.tensor<[3, 8], f32, @g0>
  %18 = exec.lm_head %16 rows #pd.column<0, 1, 2> -> !exec.tensor<[3, 10], f32, @g0>
  %19 = exec.sample %18 -> !exec.tensor<[3], i32, @g0>
  exec.yield %19, %17
}

// -----

// A lane is a part of the batch; logits are in the order of the lanes, and no name is given again
// before the last who needs what it was has it.
// CHECK: def hybrid(weights, kernels, kv, batch, ranks):
// CHECK-NEXT: """
// CHECK-NEXT: batch_0, batch_1 = lanes_of(batch, 2)
// CHECK: logits = weights.lm_head(hidden[batch_0.sampled])
// CHECK-NEXT: del hidden
// CHECK-NEXT: # lm_head [S, 5]
// CHECK-NEXT: logits_2 = weights.lm_head(hidden_2[batch_1.sampled])
// CHECK-NEXT: del hidden_2
// CHECK-NEXT: # all_gather [S, 10]
// CHECK-NEXT: logits_2 = ranks.all_gather(logits_2, 1)
// CHECK-NEXT: # all_gather [S, 10]
// CHECK-NEXT: logits = ranks.all_gather(logits, 1)
// CHECK-NEXT: return torch.cat([logits, logits_2])
exec.graph @of_two_lanes {phase = "hybrid", model = "m", tp = 2} {
  %0 = exec.input -> !exec.tensor<[3], i32, @g0>
  %1 = exec.input -> !exec.tensor<[2], i32, @g0>
  %2 = exec.embedding %0 -> !exec.tensor<[3, 8], f32, @g0>
  %3 = exec.embedding %1 -> !exec.tensor<[2, 8], f32, @g0>
  %4 = exec.lm_head %2 rows #pd.column<2> -> !exec.tensor<[1, 5], f32, @g0>
  %5 = exec.lm_head %3 rows #pd.column<1> -> !exec.tensor<[1, 5], f32, @g0>
  %6, %7 = exec.all_gather %5, %4 {axis = 1} over [@g0, @g1] -> !exec.tensor<[1, 10], f32, @g0>, !exec.tensor<[1, 10], f32, @g0>
  %8 = exec.sample %6 -> !exec.tensor<[1], i32, @g0>
  %9 = exec.sample %7 -> !exec.tensor<[1], i32, @g0>
  exec.yield %9, %8
}

// -----

// Experts: the router chooses, and each computes the rows that go to it, one after the other.
// CHECK: "experts": 4,
// CHECK-NEXT: "experts_per_token": 2,
// CHECK: def decode(weights, kernels, kv, batch, ranks):
// CHECK: # ffn [T, 8], of experts
// CHECK-NEXT: added = torch.zeros_like(normed)
// CHECK-NEXT: for expert, rows, share in layer.ffn.routed(normed):
// CHECK-NEXT:     made = expert.down(kernels.silu_multiply(expert.gate_up(normed[rows])))
// CHECK-NEXT:     added.index_add_(0, rows, made.mul_(share))
// CHECK-NEXT:     del made
exec.graph @experts {phase = "decode", model = "m"} {
  %0 = exec.input -> !exec.tensor<[1], i32, @g0>
  %1 = exec.embedding %0 -> !exec.tensor<[1, 8], f32, @g0>
  %2, %3 = exec.norm %1 {layer = 0} -> !exec.tensor<[1, 8], f32, @g0>, !exec.tensor<[1, 8], f32, @g0>
  %4 = exec.ffn %2 {layer = 0, width = 16, experts = 4, experts_per_token = 2} -> !exec.tensor<[1, 8], f32, @g0>
  %5, %6 = exec.norm %3, %4 -> !exec.tensor<[1, 8], f32, @g0>, !exec.tensor<[1, 8], f32, @g0>
  %7 = exec.lm_head %5 rows #pd.column<0> -> !exec.tensor<[1, 10], f32, @g0>
  %8 = exec.sample %7 -> !exec.tensor<[1], i32, @g0>
  exec.yield %8
}
