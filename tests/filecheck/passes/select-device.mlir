// RUN: sagec opt -p "select-device" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "select-device,select-device" --split-input-file --verify-diagnostics %s | filecheck %s
// RUN: sagec opt -p "select-device{improve=true}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix BETTER
// RUN: sagec opt -p "select-device{method=solve gap=0.001}" --split-input-file --verify-diagnostics %s | filecheck %s --check-prefix BETTER --check-prefix SOLVE

// One instance a phase: there is nothing to choose.
// CHECK-LABEL: pd.graph @one_pair
// CHECK: pd.prefill %{{.*}} on @p0
// CHECK: pd.decode %{{.*}} on @d0

cluster.model @m {layers = 32, hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, ffn = 14336, vocab = 128000}
cluster.device @g0 {flops_per_s = 9.9e14, bytes_per_s = 4.8e12}
cluster.device @g1 like @g0
cluster.link @g0 to @g1 {bytes_per_s = 4.5e11, latency_us = 2.0}
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 4000}
cluster.instance @d0 on [@g1] engine "sim" role decode model @m {kv_blocks = 4000}
pd.graph @one_pair {
  %new = pd.requests ["a": prompt 1024 generate 256, "b": prompt 96 generate 64]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// A graph in phases is placed too.
// CHECK-LABEL: pd.graph @in_phases
// CHECK: pd.prefill %{{.*}} on @p0
// CHECK: pd.decode %{{.*}} on @d0
pd.graph @in_phases {
  %new = pd.requests ["a": prompt 1024 generate 256]
  %kv = pd.phase prefill {
    %0 = pd.prefill %new
    pd.yield %0 : !pd.kv<1>
  } : !pd.kv<1>
  %end = pd.phase decode {
    %1 = pd.decode %kv
    pd.yield %1 : !pd.kv<1>
  } : !pd.kv<1>
  pd.yield %end
}

// -----

// Two long prompts do not queue behind each other.
// CHECK-LABEL: pd.graph @prefills_are_balanced
// CHECK: pd.prefill %{{.*}} on [@p0, @p1, @p1]
// CHECK: pd.decode %{{.*}} on @d0

cluster.model @m {layers = 32, hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, ffn = 14336, vocab = 128000}
cluster.device @g0 {flops_per_s = 9.9e14, bytes_per_s = 4.8e12}
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.link @g0 to @g2 {bytes_per_s = 4.5e11}
cluster.link @g1 to @g2 {bytes_per_s = 4.5e11}
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 4000}
cluster.instance @p1 on [@g1] engine "sim" role prefill model @m {kv_blocks = 4000}
cluster.instance @d0 on [@g2] engine "sim" role decode model @m {kv_blocks = 4000}
pd.graph @prefills_are_balanced {
  %new = pd.requests [
    "long": prompt 9000 generate 10,
    "short": prompt 3000 generate 10,
    "middle": prompt 4000 generate 10
  ]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// What the strategy said of a row holds, and counts as load for the others.
// CHECK-LABEL: pd.graph @said_rows_stay
// CHECK: pd.prefill %{{.*}} on [@p0, @p1]
pd.graph @said_rows_stay {
  %new = pd.requests ["a": prompt 9000 generate 10 on @p0, "b": prompt 3000 generate 10]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// A prefill that has its places keeps them; those of another graph are its own.
// CHECK-LABEL: pd.graph @placed_prefills_stay
// CHECK: pd.prefill %{{.*}} on @p1
// CHECK: pd.decode %{{.*}} on @d0
pd.graph @placed_prefills_stay {
  %new = pd.requests ["a": prompt 9000 generate 10, "b": prompt 3000 generate 10]
  %kv = pd.prefill %new on @p1
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Residents stay, and new requests go where less is to do.
// CHECK-LABEL: pd.graph @residents_stay
// CHECK: pd.decode %{{.*}} on [@d0, @d0, @d1]

cluster.model @m {layers = 32, hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, ffn = 14336, vocab = 128000}
cluster.device @g0 {flops_per_s = 9.9e14, bytes_per_s = 4.8e12}
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.link @g0 to @g1 {bytes_per_s = 4.5e11}
cluster.link @g0 to @g2 {bytes_per_s = 4.5e11}
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 4000}
cluster.instance @d0 on [@g1] engine "sim" role decode model @m {kv_blocks = 4000}
cluster.instance @d1 on [@g2] engine "sim" role decode model @m {kv_blocks = 4000}
pd.graph @residents_stay {
  %old = pd.resident on @d0 ["r": context 4000 remaining 2000, "s": context 4000]
  %new = pd.requests ["a": prompt 1000 generate 256]
  %kv = pd.prefill %new
  %all = pd.join %old, %kv
  %end = pd.decode %all
  pd.yield %end
}

// KV that a transfer moved is decoded where it went.
// CHECK-LABEL: pd.graph @moved_rows_stay
// CHECK: pd.decode %{{.*}} on [@d1, @d0]
pd.graph @moved_rows_stay {
  %new = pd.requests ["a": prompt 1000 generate 256, "b": prompt 1000 generate 256 decode_on @d0]
  %kv = pd.prefill %new
  %moved = pd.transfer %kv source @p0 target @d1 ["a"]
  %end = pd.decode %moved
  pd.yield %end
}

// A decode of residents alone is where they are.
// CHECK-LABEL: pd.graph @only_residents
// CHECK: pd.decode %{{.*}} on [@d1, @d0]
pd.graph @only_residents {
  %old = pd.resident ["r": on @d1 context 4000 remaining 2000, "s": on @d0 context 4000]
  %end = pd.decode %old
  pd.yield %end
}

// -----

// The same load on both: the nearer is taken.
// CHECK-LABEL: pd.graph @the_nearer_decodes
// CHECK: pd.decode %{{.*}} on @near

cluster.model @m {layers = 32, hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, ffn = 14336, vocab = 128000}
cluster.device @g0 {flops_per_s = 9.9e14, bytes_per_s = 4.8e12}
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.switch @rack
cluster.link @g0 to @rack {bytes_per_s = 1.0e9}
cluster.link @rack to @g1 {bytes_per_s = 1.0e9}
cluster.link @g0 to @g2 {bytes_per_s = 4.5e11}
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 4000}
cluster.instance @far on [@g1] engine "sim" role decode model @m {kv_blocks = 4000}
cluster.instance @near on [@g2] engine "sim" role decode model @m {kv_blocks = 4000}
pd.graph @the_nearer_decodes {
  %new = pd.requests ["a": prompt 4000 generate 100, "b": prompt 4000 generate 100]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Two instances behind one slow link share it: half of the KV goes the other way, though the
// instance there has as much to do as both.
// CHECK-LABEL: pd.graph @a_link_is_shared
// CHECK: pd.decode %{{.*}} on [@d2, @d0, @d1, @d2]

cluster.model @m {layers = 32, hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, ffn = 14336, vocab = 128000}
cluster.device @g0 {flops_per_s = 9.9e14, bytes_per_s = 4.8e12}
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.device @g3 like @g0
cluster.switch @rack
cluster.link @g0 to @rack {bytes_per_s = 1.0e9}
cluster.link @rack to @g1 {bytes_per_s = 1.0e12}
cluster.link @rack to @g2 {bytes_per_s = 1.0e12}
cluster.link @g0 to @g3 {bytes_per_s = 1.0e9}
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 4000}
cluster.instance @d0 on [@g1] engine "sim" role decode model @m {kv_blocks = 4000}
cluster.instance @d1 on [@g2] engine "sim" role decode model @m {kv_blocks = 4000}
cluster.instance @d2 on [@g3] engine "sim" role decode model @m {kv_blocks = 4000}
pd.graph @a_link_is_shared {
  %new = pd.requests [
    "a": prompt 4000 generate 10,
    "b": prompt 4000 generate 10,
    "c": prompt 4000 generate 10,
    "d": prompt 4000 generate 10
  ]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Where a prompt's prefix is, less of it is left to compute.
// CHECK-LABEL: pd.graph @where_less_is_left
// CHECK: pd.prefill %{{.*}} on [@p1, @p0]
// But what waits there already may take longer than computing all of it elsewhere.
// CHECK-LABEL: pd.graph @where_it_is_done_sooner
// CHECK: pd.prefill %{{.*}} on [@p0, @p1]
// A prompt of which an instance has all but the last token goes on there, whatever its role: so
// does who was swapped out of a decode.
// CHECK-LABEL: pd.graph @who_was_swapped_out_returns
// CHECK: pd.prefill %{{.*}} on [@d0, @p0]
// CHECK: pd.decode %{{.*}} on @d0
// And a prompt that has begun there goes on there: an engine may have found less than was thought.
// CHECK-LABEL: pd.graph @who_has_begun_there_goes_on
// CHECK: pd.prefill %{{.*}} on [@d0, @p0]
// CHECK: pd.decode %{{.*}} on @d0

cluster.model @m {layers = 32, hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, ffn = 14336, vocab = 128000}
cluster.device @g0 {flops_per_s = 9.9e14, bytes_per_s = 4.8e12}
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.link @g0 to @g2 {bytes_per_s = 4.5e11}
cluster.link @g1 to @g2 {bytes_per_s = 4.5e11}
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 4000}
cluster.instance @p1 on [@g1] engine "sim" role prefill model @m {kv_blocks = 4000}
cluster.instance @d0 on [@g2] engine "sim" role decode model @m {kv_blocks = 4000}
pd.graph @where_less_is_left {
  %new = pd.requests ["a": prompt 3000 generate 10, "b": prompt 3000 generate 10]
  %hit = kv.match %new on @p1 ["a": tokens 2048]
  %kv = pd.prefill %hit
  %end = pd.decode %kv
  pd.yield %end
}
pd.graph @where_it_is_done_sooner {
  %new = pd.requests ["a": prompt 9000 generate 10 on @p0, "b": prompt 3000 generate 10]
  %hit = kv.match %new on @p0 ["b": tokens 1024]
  %kv = pd.prefill %hit
  %end = pd.decode %kv
  pd.yield %end
}
pd.graph @who_was_swapped_out_returns {
  %new = pd.requests ["a": prompt 3000 generate 10, "b": prompt 3000 generate 10]
  %hit = kv.match %new on @d0 ["a": tokens 2999, "b": tokens 2048]
  %kv = pd.prefill %hit
  %end = pd.decode %kv
  pd.yield %end
}
pd.graph @who_has_begun_there_goes_on {
  %new = pd.requests ["a": prompt 3000 generate 10 computed 2048 on @d0, "b": prompt 3000 generate 10]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Instances with both roles do both, and no KV moves.
// CHECK-LABEL: pd.graph @kv_stays
// CHECK: pd.prefill %{{.*}} on [@a, @b]
// CHECK: pd.decode %{{.*}} on [@a, @b]
// A row that nothing decodes is prefilled only.
// CHECK-LABEL: pd.graph @only_prefilled
// CHECK: pd.prefill %{{.*}} on [@a, @b]
// CHECK-NOT: pd.decode

cluster.model @m {layers = 32, hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, ffn = 14336, vocab = 128000}
cluster.device @g0 {flops_per_s = 9.9e14, bytes_per_s = 4.8e12}
cluster.device @g1 like @g0
cluster.link @g0 to @g1 {bytes_per_s = 4.5e11}
cluster.instance @a on [@g0] engine "sim" role both model @m {kv_blocks = 4000}
cluster.instance @b on [@g1] engine "sim" role both model @m {kv_blocks = 4000}
pd.graph @kv_stays {mode = "time-share"} {
  %new = pd.requests ["a": prompt 1024 generate 256, "b": prompt 1024 generate 256]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}
pd.graph @only_prefilled {
  %new = pd.requests ["a": prompt 1024 generate 256, "b": prompt 1024 generate 256]
  %kv = pd.prefill %new
  pd.yield %kv
}

// -----

// Each model has its instances.
// CHECK-LABEL: pd.graph @by_model
// CHECK: pd.prefill %{{.*}} on [@s, @t]
// CHECK: pd.decode %{{.*}} on [@s, @t]

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.model @tall like @small {layers = 8}
cluster.device @g0
cluster.instance @s on [@g0] engine "sim" role both model @small {kv_blocks = 4000}
cluster.instance @t on [@g0] engine "sim" role both model @tall {kv_blocks = 4000}
pd.graph @by_model {
  %new = pd.requests ["a": prompt 64 generate 8 model @small, "b": prompt 64 generate 8 model @tall]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Caches of the same shape are preferred: only there KV goes over as it is.
// CHECK-LABEL: pd.graph @same_blocks
// CHECK: pd.decode %{{.*}} on @d1

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @small {kv_blocks = 400, block_tokens = 16}
cluster.instance @d0 on [@g0] engine "sim" role decode model @small {kv_blocks = 4000, block_tokens = 64}
cluster.instance @d1 on [@g0] engine "sim" role decode model @small {kv_blocks = 400, block_tokens = 16}
pd.graph @same_blocks {
  %new = pd.requests ["a": prompt 64 generate 8]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// Where there is none, another shape will do here; whether the engines can, legalize says.
// CHECK-LABEL: pd.graph @other_blocks
// CHECK: pd.decode %{{.*}} on @d0
pd.graph @other_blocks {
  %new = pd.requests ["a": prompt 64 generate 8 decode_on @d0, "b": prompt 64 generate 7000]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// In rank order the long request comes last and doubles the work of one instance; moves and swaps
// find the better answer, and the solver says how good it is.
// CHECK-LABEL: pd.graph @in_rank_order
// CHECK: pd.decode %{{.*}} on [@d0, @d1, @d0]
// CHECK-NOT: placement
// BETTER-LABEL: pd.graph @in_rank_order
// BETTER: pd.decode %{{.*}} on [@d[[SHORT:[01]]], @d[[SHORT]], @d{{[01]}}]
// SOLVE: attributes {placement = "solve: makespan {{[0-9]+}} us, gap 0.0% (within gap), greedy {{[0-9]+}} us"}

cluster.model @m {layers = 32, hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, ffn = 14336, vocab = 128000}
cluster.device @g0 {flops_per_s = 9.9e14, bytes_per_s = 4.8e12}
cluster.device @g1 like @g0
cluster.device @g2 like @g0
cluster.link @g0 to @g1 {bytes_per_s = 4.5e11}
cluster.link @g0 to @g2 {bytes_per_s = 4.5e11}
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 4000}
cluster.instance @d0 on [@g1] engine "sim" role decode model @m {kv_blocks = 4000}
cluster.instance @d1 on [@g2] engine "sim" role decode model @m {kv_blocks = 4000}
pd.graph @in_rank_order {
  %new = pd.requests [
    "short": prompt 100 generate 4000,
    "also": prompt 100 generate 4000,
    "long": prompt 100 generate 8000
  ]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// What fits nowhere says how much is missing.
// CHECK: error: "b": with its output it needs 132 KV blocks of 16 tokens (2100 tokens), and @d1, the largest that may hold it, has 100
// CHECK: give it more kv_blocks, or the request less to generate

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @small {kv_blocks = 400}
cluster.instance @d0 on [@g0] engine "sim" role decode model @small {kv_blocks = 40}
cluster.instance @d1 on [@g0] engine "sim" role decode model @small {kv_blocks = 100}
pd.graph @too_small {
  %new = pd.requests ["a": prompt 100 generate 8, "b": prompt 100 generate 2000]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// CHECK: error: "a": its prompt needs 7 KV blocks of 16 tokens (100 tokens), and @p0, the largest that may hold it, has 6
// CHECK: give it more kv_blocks, or the request less to generate

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @small {kv_blocks = 6}
cluster.instance @d0 on [@g0] engine "sim" role decode model @small {kv_blocks = 400}
pd.graph @prompt_too_long {
  %new = pd.requests ["a": prompt 100 generate 8]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// CHECK: error: "a": no path for its KV from @p0 to @d0
// CHECK: declare a cluster.link between their devices, or place it on an instance with role both

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.device @g0
cluster.device @g1
cluster.instance @p0 on [@g0] engine "sim" role prefill model @small {kv_blocks = 40}
cluster.instance @d0 on [@g1] engine "sim" role decode model @small {kv_blocks = 40}
pd.graph @no_path {
  %new = pd.requests ["a": prompt 100 generate 8]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// CHECK: error: instance @b has role both, and graph @strict is strict: one phase an instance
// CHECK: give it role prefill or decode, or the graph mode = "time-share" or "hybrid"

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.device @g0
cluster.instance @b on [@g0] engine "sim" role both model @small {kv_blocks = 40}
pd.graph @strict {mode = "strict"} {
  %new = pd.requests ["a": prompt 100 generate 8]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// CHECK: error: "b": no instance runs model @large
// CHECK: there are: @small

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.device @g0
cluster.instance @b on [@g0] engine "sim" role both model @small {kv_blocks = 40}
pd.graph @unknown_model {
  %new = pd.requests ["a": prompt 100 generate 8, "b": prompt 100 generate 8 model @large]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// CHECK: error: "a" names no model
// CHECK: name one of those that run: @small, @tall
// CHECK: error: "a" asks for model @small and is to prefill on @t, which runs @tall
// CHECK: instances that prefill @small: @s

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.model @tall like @small {layers = 8}
cluster.device @g0
cluster.instance @s on [@g0] engine "sim" role both model @small {kv_blocks = 40}
cluster.instance @t on [@g0] engine "sim" role both model @tall {kv_blocks = 40}
pd.graph @no_model {
  %new = pd.requests ["a": prompt 100 generate 8]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.model @tall like @small {layers = 8}
cluster.device @g0
cluster.instance @s on [@g0] engine "sim" role both model @small {kv_blocks = 40}
cluster.instance @t on [@g0] engine "sim" role both model @tall {kv_blocks = 40}
pd.graph @other_model {
  %new = pd.requests ["a": prompt 100 generate 8 model @small on @t]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// CHECK: error: no instance @p9
// CHECK: there are: @p0, @d0

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @small {kv_blocks = 40}
cluster.instance @d0 on [@g0] engine "sim" role decode model @small {kv_blocks = 40}
pd.graph @matched_nowhere {
  %new = pd.requests ["a": prompt 100 generate 8 decode_on @d0]
  %hit = kv.match %new on @p9 ["a": tokens 64]
  %kv = pd.prefill %hit
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// CHECK: error: "a" is to decode on @p0, whose role is prefill
// CHECK: instances that decode: @d0

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @small {kv_blocks = 40}
cluster.instance @d0 on [@g0] engine "sim" role decode model @small {kv_blocks = 40}
pd.graph @other_role {
  %new = pd.requests ["a": prompt 100 generate 8 decode_on @p0]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// Nothing new goes to an instance whose turn has no steps, unless it says so or finds no other.
// CHECK-LABEL: pd.graph @who_pauses
// CHECK: pd.prefill %{{.*}} on [@x, @y, @x]
// CHECK-NEXT: pd.decode %{{.*}} on [@x, @y, @x]
// CHECK-LABEL: pd.graph @all_pause
// CHECK: pd.prefill %{{.*}} on @x

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.device @g0
cluster.instance @x on [@g0] engine "sim" role both model @small {kv_blocks = 400, pool = "shared"}
cluster.instance @y on [@g0] engine "sim" role both model @small {kv_blocks = 400, pool = "shared"}
pd.graph @who_pauses {
  pd.turns ["x": steps 9, "y": steps 0]
  %new = pd.requests [
    "a": prompt 100 generate 8, "says so": prompt 100 generate 8 on @y decode_on @y, "b": prompt 900 generate 8
  ]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}
pd.graph @all_pause {
  pd.turns ["x": steps 0, "y": steps 0]
  %new = pd.requests ["a": prompt 100 generate 8]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// CHECK: error: no instance @d9
// CHECK: there are: @p0, @d0

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @small {kv_blocks = 40}
cluster.instance @d0 on [@g0] engine "sim" role decode model @small {kv_blocks = 40}
pd.graph @no_such_instance {
  %old = pd.resident on @d9 ["r": context 100 remaining 8]
  %end = pd.decode %old
  pd.yield %end
}

// -----

// CHECK: error: "a": no instance of model @small has role decode or both
// CHECK: change a role, or declare a cluster.instance

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "sim" role prefill model @small {kv_blocks = 40}
pd.graph @nobody_decodes {
  %new = pd.requests ["a": prompt 100 generate 8]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// CHECK: error: "a": no instance runs its model
// CHECK: there are: none; declare a cluster.instance

pd.graph @no_cluster {
  %new = pd.requests ["a": prompt 100 generate 8]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}

// -----

// A kind whose figures nobody knows cannot be reckoned with.
// CHECK: error: cluster.device @g0: no device kind 'moon'
// CHECK: there are: cpu, a10, {{.*}}; or say memory_bytes, flops_per_s, bytes_per_s

cluster.model @small {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024}
cluster.device @g0 {kind = "moon"}
cluster.instance @i0 on [@g0] engine "sim" role both model @small {kv_blocks = 40}
pd.graph @on_the_moon {
  %new = pd.requests ["a": prompt 100 generate 8]
  %kv = pd.prefill %new
  %end = pd.decode %kv
  pd.yield %end
}
