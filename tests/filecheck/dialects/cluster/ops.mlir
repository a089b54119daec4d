// RUN: sagec opt %s | sagec opt - | filecheck %s
// RUN: sagec opt --print-op-generic %s | sagec opt - | filecheck %s
// RUN: sagec opt --print-op-generic %s | filecheck %s --check-prefix=GENERIC

// A model says its shape; the rest has defaults, which are not printed where nobody says them.
// CHECK: cluster.model @tiny {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
// GENERIC: "cluster.model"() <{sym_name = "tiny", layers = 4 : i64, {{.*}}vocab = 1024 : i64}> : () -> ()
cluster.model @tiny {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}

// All that a model can say prints in the order of the declaration, however it was written.
// CHECK-NEXT: cluster.model @moe {layers = 2, hidden = 64, heads = 4, kv_heads = 4, head_dim = 16, ffn = 128, vocab = 512, dtype = "fp8", max_context = 4096, experts = 8, experts_per_token = 2, tied = 1, path = "models/moe"}
cluster.model @moe {
  path = "models/moe", tied = 1, experts_per_token = 2, experts = 8, max_context = 4096, dtype = "fp8",
  vocab = 512, ffn = 128, head_dim = 16, kv_heads = 4, heads = 4, hidden = 64, layers = 2
}

// What is like another says only what differs.
// CHECK-NEXT: cluster.model @long like @tiny {max_context = 1048576}
cluster.model @long like @tiny {max_context = 1048576}

// A device may say nothing at all.
// CHECK-NEXT: cluster.device @cpu
// GENERIC: "cluster.device"() <{sym_name = "cpu"}> : () -> ()
cluster.device @cpu

// Integers do for floats, and floats keep every digit.
// CHECK-NEXT: cluster.device @g0 {kind = "h200", memory_bytes = 151397597184, flops_per_s = 990000000000000.0, bytes_per_s = 4800000000000.0}
cluster.device @g0 {kind = "h200", memory_bytes = 151397597184, flops_per_s = 9.9e14, bytes_per_s = 4800000000000}

// Large floats print with a point, as MLIR wants them.
// CHECK-NEXT: cluster.device @g1 like @g0 {flops_per_s = 1.0e+16}
cluster.device @g1 like @g0 {flops_per_s = 1.0e16}

// What its steps were measured to take is in a file, which is read when an instance is.
// CHECK-NEXT: cluster.device @g2 {kind = "h200", profile = "profiles/h200.json"}
cluster.device @g2 {kind = "h200", profile = "profiles/h200.json"}

// Names of other characters than letters, digits, _ $ and . stand in quotes.
// CHECK-NEXT: cluster.device @"rack 7-3"
cluster.device @"rack 7-3"

// CHECK-NEXT: cluster.switch @nvs0
// GENERIC: "cluster.switch"() <{sym_name = "nvs0"}> : () -> ()
cluster.switch @nvs0

// A link runs in both directions.
// CHECK-NEXT: cluster.link @g0 to @nvs0
// CHECK-NEXT: cluster.link @g1 to @nvs0 {bytes_per_s = 450000000000.0, latency_us = 2.5}
// GENERIC: "cluster.link"() <{source = @g0, target = @nvs0}> : () -> ()
cluster.link @g0 to @nvs0
cluster.link @g1 to @nvs0 {bytes_per_s = 4.5e11, latency_us = 2.5}

// The least that an instance says.
// CHECK-NEXT: cluster.instance @p0 on [@g0] engine "torch" role prefill model @tiny {kv_blocks = 4000}
// GENERIC: "cluster.instance"() <{sym_name = "p0", devices = [@g0], engine = "torch", role = "prefill", model = @tiny, kv_blocks = 4000 : i64}> : () -> ()
cluster.instance @p0 on [@g0] engine "torch" role prefill model @tiny {kv_blocks = 4000}

// And all of it.
// CHECK-NEXT: cluster.instance @d0 on [@g0, @g1] engine "turbomind" role decode model @tiny {tp = 2, pp = 1, kv_blocks = 9, block_tokens = 64, kv_dtype = "int8", kv_layout = "tm", max_step_tokens = 2048, max_batch = 128, max_partial_prefills = 1, quantization = "awq", draft_layers = 1, draft_tokens = 3, dtype = "f16", pool = "shared", switch_us = 800000, options = "host_blocks=64"}
cluster.instance @d0 on [@g0, @g1] engine "turbomind" role decode model @tiny {
  tp = 2, pp = 1, kv_blocks = 9, block_tokens = 64, kv_dtype = "int8", kv_layout = "tm", max_step_tokens = 2048,
  max_batch = 128, max_partial_prefills = 1, quantization = "awq", draft_layers = 1, draft_tokens = 3, switch_us = 800000, options = "host_blocks=64", pool = "shared", dtype = "f16"
}

// An instance may do both phases. Attributes that no op knows stay.
// CHECK-NEXT: cluster.instance @b0 on [@cpu] engine "torch" role both model @moe {kv_blocks = 1} attributes {note = "kept"}
// CHECK-NEXT: cluster.switch @nvs1 {note = "kept"}
cluster.instance @b0 on [@cpu] engine "torch" role both model @moe {kv_blocks = 1} attributes {note = "kept"}
cluster.switch @nvs1 {note = "kept"}
