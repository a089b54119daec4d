// RUN: sagec opt -p "serve" --split-input-file --verify-diagnostics %s | filecheck %s

// TurboMind's loop aborts where a step leaves two prompts unfinished, so its instances say that one
// may be; then every step that the passes make is legal.
// CHECK: error: instance @i0: any number of prompts may be unfinished after a step
// CHECK: turbomind takes 1: say max_partial_prefills = 1
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "turbomind" role both model @m {kv_blocks = 40, block_tokens = 64}
pd.graph @partials {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK-LABEL: pd.graph @one_partial
// CHECK: 0: "a" [0, 8);
// CHECK-NEXT: 1: "a" [8, 16);
// CHECK-NEXT: 2: "a" [16, 20), "b" [0, 8);
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "turbomind" role both model @m {kv_blocks = 40, block_tokens = 64, max_partial_prefills = 1}
pd.graph @one_partial {
  %new = pd.requests ["a": prompt 20 generate 3, "b": prompt 20 generate 3]
  %kv = pd.prefill %new chunk 8
  %end = pd.decode %kv
}

// -----

// CHECK: error: instance @i0: block_tokens 16
// CHECK: turbomind takes 64, 128, 256
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @i0 on [@g0] engine "turbomind" role both model @m {kv_blocks = 40, max_partial_prefills = 1}
pd.graph @block {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}
