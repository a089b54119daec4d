// RUN: sagec opt -p "convert-pd-to-exec" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "convert-pd-to-exec,convert-pd-to-exec" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "convert-pd-to-exec{step=1}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix=ONE
// RUN: sagec opt -p "convert-pd-to-exec{instance=nobody}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix=NOBODY

// RUN: sagec opt -p "convert-pd-to-exec{kv-tier=host kv-bytes-per-s=1000000000}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix=HOST
// RUN: sagec opt -p "convert-pd-to-exec{kv-tier=host}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix=HOW-FAR

// RUN: sagec opt -p "convert-pd-to-exec{micro-batches=2}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix=TWO
// RUN: sagec opt -p "convert-pd-to-exec{micro-batches=0}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix=ZERO
// RUN: sagec opt -p "convert-pd-to-exec{kv-bytes-per-s=5}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix=NO-WAY

// HOW-FAR: error: convert-pd-to-exec: kv-tier=host kv-bytes-per-s=None kv-latency-us=10.0; say a bandwidth above 0, and a latency of 0 or more
// ZERO: error: instance @x: micro_batches=0
// NO-WAY: error: convert-pd-to-exec: kv-tier=device kv-bytes-per-s=5; KV on the device needs no way, name another tier

// NOBODY: error: no instance @nobody; there are: @x

// A prompt on one device. The graph is written behind the steps that it is made of.
// CHECK-LABEL: pd.graph @dense
// CHECK: exec.graph @dense_x_0 {phase = "prefill", model = "m", instance = "x", tp = 1, pp = 1, dp = 1} {
// CHECK-NEXT: %[[T:.*]] = exec.input -> !exec.tensor<[6], i32, @g0>
// CHECK-NEXT: %[[H:.*]] = exec.embedding %[[T]] {time_us = {{[0-9.]+}}, bytes = 1560.0} -> !exec.tensor<[6, 64], bf16, @g0>
// CHECK-NEXT: %[[N:.*]], %[[S:.*]] = exec.norm %[[H]] {layer = 0,
// CHECK-NEXT: %[[Q:.*]] = exec.qkv %[[N]] {layer = 0, {{.*}}flops = 98304.0, bytes = 18688.0, heads = 4, kv_heads = 2, head_dim = 16} -> !exec.tensor<[6, 128], bf16, @g0>
// CHECK-NEXT: %[[KV:.*]] = exec.kv_load {layer = 0} -> !exec.tensor<[0, 2, 2, 16], bf16, @g0>
// CHECK-NEXT: %[[A:.*]], %[[NEW:.*]] = exec.prefill_attention %[[Q]], %[[KV]] {layer = 0, {{.*}}flops = 5376.0, {{.*}}} begin #pd.column<0> end #pd.column<6> -> !exec.tensor<[6, 64], bf16, @g0>, !exec.tensor<[6, 2, 2, 16], bf16, @g0>
// CHECK-NEXT: exec.kv_store %[[NEW]] {layer = 0,
// CHECK-NEXT: %[[P:.*]] = exec.projection %[[A]] {layer = 0, {{.*}}} -> !exec.tensor<[6, 64], bf16, @g0>
// CHECK-NEXT: %[[N2:.*]], %[[S2:.*]] = exec.norm %[[S]], %[[P]] {layer = 0,
// CHECK-NEXT: %[[F:.*]] = exec.ffn %[[N2]] {layer = 0, {{.*}}width = 112} -> !exec.tensor<[6, 64], bf16, @g0>
// CHECK-NEXT: %[[N3:.*]], %[[S3:.*]] = exec.norm %[[S2]], %[[F]] {time_us
// CHECK-NEXT: %[[L:.*]] = exec.lm_head %[[N3]] {{.*}} rows #pd.column<5> -> !exec.tensor<[1, 97], bf16, @g0>
// CHECK-NEXT: %[[NEXT:.*]] = exec.sample %[[L]] {{.*}} -> !exec.tensor<[1], i32, @g0>
// CHECK-NEXT: exec.yield %[[NEXT]]
// CHECK-NOT: exec.graph
// ONE: error: convert-pd-to-exec: no graph computes anything at step=1
// ONE: there are: @x in steps [0, 1)
cluster.model @m {layers = 1, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @m {kv_blocks = 40}
pd.graph @dense {
  pd.steps @x {num_steps = 1, max_step_tokens = 16} ["a": prompt 6 blocks 1] chunks {0: "a" [0, 6)}
  pd.yield
}

// -----

// A chunk that does not end its prompt samples nothing; the next step joins its end and a decode.
// CHECK-LABEL: pd.graph @hybrid
// CHECK: exec.graph @hybrid_x_0 {phase = "prefill"
// CHECK: exec.prefill_attention {{.*}} begin #pd.column<0> end #pd.column<4>
// CHECK-NOT: exec.lm_head
// CHECK: exec.yield{{$}}
// CHECK: exec.graph @hybrid_x_1 {phase = "hybrid"
// CHECK: exec.kv_load {layer = 0} -> !exec.tensor<[4, 2, 2, 16], int8, @g0>
// CHECK: %[[A:.*]], %{{.*}} = exec.prefill_attention {{.*}} begin #pd.column<4> end #pd.column<6>
// CHECK: exec.kv_load {layer = 0} -> !exec.tensor<[9, 2, 2, 16], int8, @g0>
// CHECK: %[[B:.*]], %{{.*}} = exec.decode_attention {{.*}}first = 2} context #pd.column<9> -> !exec.tensor<[1, 64], bf16, @g0>, !exec.tensor<[1, 2, 2, 16], int8, @g0>
// CHECK: exec.projection %[[A]], %[[B]]
// CHECK: exec.lm_head {{.*}} rows #pd.column<1, 2>
// HOST: exec.graph @hybrid_x_1 {phase = "hybrid"
// HOST: exec.kv_load {layer = 0, time_us = 10.256, bytes = 256.0, tier = "host"} -> !exec.tensor<[4, 2, 2, 16], int8, @g0>
// HOST: exec.kv_store %{{.*}} {layer = 0, time_us = 10.128, bytes = 128.0, tier = "host"}
// CHECK: exec.graph @hybrid_x_2 {phase = "decode"
// TWO: exec.graph @hybrid_x_2 {phase = "decode"
// TWO: exec.decode_attention {{.*}} context #pd.column<6>
// TWO: %[[A:.*]] = exec.sample
// TWO: exec.decode_attention {{.*}} context #pd.column<10>
// TWO: %[[B:.*]] = exec.sample
// TWO: exec.yield %[[A]], %[[B]]
// CHECK: exec.decode_attention {{.*}}head_dim = 16} context #pd.column<6, 10>
// CHECK: exec.graph @hybrid_x_3 {phase = "decode"
// CHECK: exec.decode_attention {{.*}} context #pd.column<7>
// CHECK-NOT: exec.graph
// ONE-NOT: exec.graph @hybrid_x_0
// ONE: exec.graph @hybrid_x_1
// ONE-NOT: exec.graph @hybrid_x_2
cluster.model @m {layers = 1, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @m {kv_blocks = 40, kv_dtype = "int8"}
pd.graph @hybrid {
  pd.steps @x {num_steps = 5, max_step_tokens = 16} ["a": prompt 6 blocks 1 begin 2 until 8, "b": prompt 9 computed 9 blocks 1 begin 1 until 11] chunks {0: "a" [0, 4); 1: "a" [4, 6)}
  pd.yield
}

// -----

// Where prompts and decodes share the time, nobody decodes in a step that has chunks.
// CHECK-LABEL: pd.graph @time_share
// CHECK: exec.graph @time_share_x_0 {phase = "prefill"
// CHECK-NOT: exec.decode_attention
// CHECK: exec.graph @time_share_x_1 {phase = "decode"
// CHECK: exec.decode_attention {{.*}} context #pd.column<6, 9>
// CHECK: exec.graph @time_share_x_2 {phase = "decode"
// CHECK: exec.decode_attention {{.*}} context #pd.column<10>
cluster.model @m {layers = 1, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @m {kv_blocks = 40}
pd.graph @time_share {mode = "time-share"} {
  pd.steps @x {num_steps = 3, max_step_tokens = 16} ["a": prompt 6 blocks 1 begin 1 until 7, "b": prompt 9 computed 9 blocks 1 until 11] chunks {0: "a" [0, 6)}
  pd.yield
}

// -----

// Two ranks: half of the heads, of the ffn and of the vocabulary, rounded up; sums on both. The
// links decide how long they take.
// CHECK-LABEL: pd.graph @tensor_parallel
// CHECK: exec.graph @tensor_parallel_x_0 {phase = "decode", {{.*}}, tp = 2, pp = 1, dp = 1}
// CHECK: exec.qkv {{.*}} heads = 2, kv_heads = 1, head_dim = 16} -> !exec.tensor<[2, 64], bf16, @g0>
// CHECK: %[[P:.*]] = exec.projection
// CHECK-NEXT: %[[R:.*]] = exec.all_reduce %[[P]] {layer = 0, time_us = 20.256, bytes = 256.0} over [@g0, @g1] -> !exec.tensor<[2, 64], bf16, @g0>
// CHECK-NEXT: exec.norm %{{.*}}, %[[R]]
// CHECK-NEXT: %[[F:.*]] = exec.ffn {{.*}} width = 56}
// CHECK-NEXT: exec.all_reduce %[[F]]
// CHECK: %[[L:.*]] = exec.lm_head {{.*}} -> !exec.tensor<[2, 49], bf16, @g0>
// CHECK-NEXT: %[[G:.*]] = exec.all_gather %[[L]] {{{.*}}axis = 1} over [@g0, @g1] -> !exec.tensor<[2, 98], bf16, @g0>
// CHECK-NEXT: exec.sample %[[G]]
cluster.model @m {layers = 1, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1 like @g0
cluster.switch @s
cluster.link @g0 to @s {bytes_per_s = 1.0e9, latency_us = 4.0}
cluster.link @s to @g1 {bytes_per_s = 2.0e9, latency_us = 6.0}
cluster.instance @x on [@g0, @g1] engine "sim" role both model @m {kv_blocks = 40, tp = 2}
pd.graph @tensor_parallel {
  pd.steps @x {num_steps = 1, max_step_tokens = 16} ["a": prompt 6 computed 6 blocks 1 until 7, "b": prompt 9 computed 9 blocks 1 until 10]
  pd.yield
}

// -----

// More ranks than KV heads: two of them have the same.
// CHECK-LABEL: pd.graph @repeated_kv_heads
// CHECK: exec.qkv {{.*}} heads = 1, kv_heads = 1, head_dim = 16} -> !exec.tensor<[1, 48], bf16, @g0>
cluster.model @m {layers = 1, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.device @g3 like @g0
cluster.link @g0 to @g1
cluster.link @g1 to @g2
cluster.link @g2 to @g3
cluster.instance @x on [@g0, @g1, @g2, @g3] engine "sim" role both model @m {kv_blocks = 40, tp = 4}
pd.graph @repeated_kv_heads {
  pd.steps @x {num_steps = 1, max_step_tokens = 16} ["a": prompt 6 computed 6 blocks 1 until 7]
  pd.yield
}

// -----

// Two stages: the stream, and what the last layer adds to it, go from one to the other.
// CHECK-LABEL: pd.graph @stages
// CHECK: exec.graph @stages_x_0 {{{.*}}, tp = 1, pp = 2, dp = 1}
// CHECK: %{{.*}}, %[[S:.*]] = exec.norm {{.*}} {layer = 0,
// CHECK: %{{.*}}, %[[S2:.*]] = exec.norm %[[S]], %{{.*}} {layer = 0,
// CHECK-NEXT: %[[F:.*]] = exec.ffn
// CHECK-NEXT: exec.send %[[S2]] {time_us = 10.013, bytes = 128.0, channel = 0} to @g1
// CHECK-NEXT: exec.send %[[F]] {time_us = 10.013, bytes = 128.0, channel = 1} to @g1
// CHECK-NEXT: %[[T:.*]] = exec.recv {bytes = 128.0, channel = 0} from @g0 -> !exec.tensor<[1, 64], bf16, @g1>
// CHECK-NEXT: %[[U:.*]] = exec.recv {bytes = 128.0, channel = 1} from @g0 -> !exec.tensor<[1, 64], bf16, @g1>
// CHECK-NEXT: exec.norm %[[T]], %[[U]] {layer = 1,
// CHECK: exec.norm {{.*}} {layer = 2,
// CHECK: exec.sample {{.*}} -> !exec.tensor<[1], i32, @g1>
cluster.model @m {layers = 3, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1
cluster.instance @x on [@g0, @g1] engine "sim" role both model @m {kv_blocks = 40, pp = 2}
pd.graph @stages {
  pd.steps @x {num_steps = 1, max_step_tokens = 16} ["a": prompt 6 computed 6 blocks 1 until 7]
  pd.yield
}

// -----

// Experts are whole; each rank has half of them, and the sums of both make the layer.
// CHECK-LABEL: pd.graph @experts
// CHECK: %[[F:.*]] = exec.ffn {{.*}}width = 112, experts = 4, experts_per_token = 2} -> !exec.tensor<[1, 64], bf16, @g0>
// CHECK-NEXT: exec.all_reduce %[[F]] {{.*}} over [@g0, @g1]
cluster.model @m {layers = 1, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97, experts = 8, experts_per_token = 2}
cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1
cluster.instance @x on [@g0, @g1] engine "sim" role both model @m {kv_blocks = 40, tp = 2}
pd.graph @experts {
  pd.steps @x {num_steps = 1, max_step_tokens = 16} ["a": prompt 6 computed 6 blocks 1 until 7]
  pd.yield
}

// -----

// Shapes that do not fit the layout.
// CHECK: error: instance @x: model @m: 4 heads do not split over tp=3
// CHECK: what does: tp = 1, 2, 4
cluster.model @m {layers = 1, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.instance @x on [@g0, @g1, @g2] engine "sim" role both model @m {kv_blocks = 40, tp = 3}
pd.graph @heads {
  pd.steps @x {num_steps = 1, max_step_tokens = 16} ["a": prompt 6 computed 6 blocks 1 until 7]
  pd.yield
}

// -----

// CHECK: error: instance @x: model @m: 1 layers do not fill pp=2 stages
// CHECK: at most 1
cluster.model @m {layers = 1, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1 like @g0
cluster.link @g0 to @g1
cluster.instance @x on [@g0, @g1] engine "sim" role both model @m {kv_blocks = 40, pp = 2}
pd.graph @layers {
  pd.steps @x {num_steps = 1, max_step_tokens = 16} ["a": prompt 6 computed 6 blocks 1 until 7]
  pd.yield
}

// -----

// CHECK: error: instance @x: no link leads from @g0 to @g1, and its ranks exchange tensors
// CHECK: declare a cluster.link
cluster.model @m {layers = 1, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1 like @g0
cluster.instance @x on [@g0, @g1] engine "sim" role both model @m {kv_blocks = 40, tp = 2}
pd.graph @no_link {
  pd.steps @x {num_steps = 1, max_step_tokens = 16} ["a": prompt 6 computed 6 blocks 1 until 7]
  pd.yield
}

// -----

// CHECK: error: pd.graph @unscheduled has no pd.steps
// CHECK: run fuse-steps first
cluster.model @m {layers = 1, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @m {kv_blocks = 40}
pd.graph @unscheduled {
  %new = pd.requests ["a": prompt 80 generate 32]
  %kv = pd.prefill %new on @x
  pd.yield %kv
}

// -----

// Names that would be the same.
// CHECK: error: two steps would be @a_b_c_0
// CHECK: rename a graph or an instance
cluster.model @m {layers = 1, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @b_c on [@g0] engine "sim" role both model @m {kv_blocks = 40}
cluster.instance @c on [@g0] engine "sim" role both model @m {kv_blocks = 40}
pd.graph @a {
  pd.steps @b_c {num_steps = 1, max_step_tokens = 16} ["a": prompt 6 blocks 1] chunks {0: "a" [0, 6)}
  pd.yield
}
pd.graph @a_b {
  pd.steps @c {num_steps = 1, max_step_tokens = 16} ["a": prompt 6 blocks 1] chunks {0: "a" [0, 6)}
  pd.yield
}
