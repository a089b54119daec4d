// RUN: sagec opt --split-input-file --verify-diagnostics --parsing-diagnostics %s | filecheck %s

// What is required must be said; what it means stands in the message.
// CHECK: :5:1: error: cluster.model: 'layers' is missing: transformer layers
cluster.model @a {heads = 8}

// -----

// One that is like another may leave everything out, but not be like itself.
// CHECK: error: cluster.device: @g0 is like itself
// CHECK: name another one
cluster.device @g0 like @g0

// -----

// CHECK: error: cluster.model: 8 heads do not share 3 kv_heads evenly
// CHECK: kv_heads must divide heads
cluster.model @a {layers = 4, hidden = 256, heads = 8, kv_heads = 3, head_dim = 32, ffn = 688, vocab = 1024}

// -----

// CHECK: error: cluster.model: 'layers' is 0
// CHECK: 1 or more
cluster.model @a {layers = 0, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}

// -----

// CHECK: error: cluster.model: 'tied' is 2
// CHECK: from 0 to 1
cluster.model @a like @b {tied = 2}

// -----

// CHECK: error: cluster.model: 'dtype' is "f64"
// CHECK: one of: f32, f16, bf16, fp8
cluster.model @a like @b {dtype = "f64"}

// -----

// The caret stands under the name.
// CHECK: error: no 'layer' here
// CHECK: | cluster.model @a {layer = 1}
// CHECK-NEXT: |                   ^{{.*}} there are: layers, hidden, heads, kv_heads, head_dim, ffn, vocab, dtype, max_context, experts, experts_per_token, tied, path
cluster.model @a {layer = 1}

// -----

// CHECK: error: 'layers' is given twice
cluster.model @a {layers = 1, layers = 2}

// -----

// CHECK: error: 'layers' is an integer, not 1.5
cluster.model @a {layers = 1.5}

// -----

// CHECK: error: expected a number for 'layers'
cluster.model @a {layers = "4"}

// -----

// CHECK: error: 'layers': 9223372036854775808 does not fit 64 bits
cluster.model @a {layers = 9223372036854775808}

// -----

// CHECK: error: expected 'kind' in quotes
cluster.device @a {kind = cpu}

// -----

// CHECK: error: 'flops_per_s' must fit a float of 64 bits
cluster.device @a {flops_per_s = 1.0e999}

// -----

// CHECK: error: cluster.device: 'flops_per_s' is -1.0
// CHECK: 1 or more
cluster.device @a {flops_per_s = -1.0}

// -----

// The generic form can say what the custom form cannot: attributes of another type.
// CHECK: error: cluster.device: 'memory_bytes' must be an i64, not 5 : i32
"cluster.device"() <{sym_name = "a", memory_bytes = 5 : i32}> : () -> ()

// -----

// CHECK: error: cluster.device: 'bytes_per_s' must be an f64, not 5 : i64
"cluster.device"() <{sym_name = "a", bytes_per_s = 5}> : () -> ()

// -----

// CHECK: error: cluster.device: 'kind' must be a string, not 5 : i64
"cluster.device"() <{sym_name = "a", kind = 5}> : () -> ()

// -----

// References are flat: all symbols are the module's.
// CHECK: Expected SymbolRefAttr with no nested symbols.
"cluster.link"() <{source = @a::@b, target = @c}> : () -> ()

// -----

// CHECK: error: cluster.link: both ends are @g0
// CHECK: name two
cluster.link @g0 to @g0

// -----

// CHECK: error: cluster.instance: @p0: tp 2 x pp 1 is 2 ranks on 1 devices
// CHECK: each rank has its own
cluster.instance @p0 on [@g0] engine "torch" role both model @m {tp = 2, kv_blocks = 1}

// -----

// CHECK: error: cluster.instance: @p0: @g0 is named twice
// CHECK: each rank has its own device
cluster.instance @p0 on [@g0, @g0] engine "torch" role both model @m {tp = 2, kv_blocks = 1}

// -----

// CHECK: error: cluster.instance: 'kv_blocks' is missing: blocks of the KV cache
cluster.instance @p0 on [@g0] engine "torch" role both model @m

// -----

// CHECK: error: Expected one of 'both', 'decode', 'prefill' as the role
cluster.instance @p0 on [@g0] engine "torch" role all model @m {kv_blocks = 1}

// -----

// CHECK: error: cluster.instance: @p0: role 'all'
// CHECK: one of: prefill, decode, both
"cluster.instance"() <{sym_name = "p0", devices = [@g0], engine = "torch", kv_blocks = 1, model = @m, role = "all"}> : () -> ()

// -----

// CHECK: error: expected the engine's name in quotes
cluster.instance @p0 on [@g0] engine torch role both model @m {kv_blocks = 1}

// -----

// Symbols are defined once.
// CHECK: error: "g0" is defined twice
// CHECK: the first is {{.*}}cluster/invalid.mlir:{{[0-9]+}}:1
cluster.device @g0
cluster.switch @g0

// -----

// CHECK: error: no op 'cluster.devcie'
// CHECK: did you mean 'cluster.device'? (there are: cluster.device, cluster.instance, cluster.link, cluster.model, cluster.switch)
cluster.switch @a
cluster.devcie @b
