// RUN: sagec opt --split-input-file --verify-diagnostics --parsing-diagnostics %s | filecheck %s

// Types.
// CHECK: error: no type 'f64'
// CHECK: one of: f32, f16, bf16, fp8, int8, int4, i32
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[4], f64, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.input: the result is [4] bf16
// CHECK: it must be [4] i32
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[4], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.input: the result has 2 dimensions
// CHECK: it must have 1
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[4, 1], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: no 'devices' here
// CHECK: there are: stream, layer, time_us, flops, bytes
exec.graph @a {model = "m"} {
  %t = exec.input {devices = 1} -> !exec.tensor<[4], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.input: 'stream' is "main"
// CHECK: one of: compute, comm, copy
exec.graph @a {model = "m"} {
  %t = exec.input {stream = "main"} -> !exec.tensor<[4], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.input: 'time_us' is -1.0
// CHECK: 0 or more
exec.graph @a {model = "m"} {
  %t = exec.input {time_us = -1} -> !exec.tensor<[4], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.input: 2 offsets for 1 results
// CHECK: one each, 0 or more
exec.graph @a {model = "m"} {
  %t = exec.input offsets #pd.column<0, 16> -> !exec.tensor<[4], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.embedding: the operand has 2 dimensions
// CHECK: it must have 1
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %x = exec.embedding %t -> !exec.tensor<[4, 8], bf16, @g0>
  %y = exec.embedding %x -> !exec.tensor<[4, 8], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.embedding: the result is [5, 8] bf16
// CHECK: it must be [4, 8] bf16
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %x = exec.embedding %t -> !exec.tensor<[5, 8], bf16, @g0>
  exec.yield
}

// -----

// Only sends, receipts and migrations move anything.
// CHECK: error: exec.embedding: its tensors are on @g0 and @g1
// CHECK: only exec.send, exec.recv and exec.kv_migrate move any
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %x = exec.embedding %t -> !exec.tensor<[4, 8], bf16, @g1>
  exec.yield
}

// -----

// CHECK: error: exec.norm: what is added is [4, 9] bf16
// CHECK: it must be [4, 8] bf16
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %x = exec.embedding %t -> !exec.tensor<[4, 8], bf16, @g0>
  %y = exec.embedding %t -> !exec.tensor<[4, 9], bf16, @g0>
  %n, %s = exec.norm %x, %y -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.norm: the second result is [4, 8] f32
// CHECK: it must be [4, 8] bf16
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %x = exec.embedding %t -> !exec.tensor<[4, 8], bf16, @g0>
  %n, %s = exec.norm %x -> !exec.tensor<[4, 8], bf16, @g0>, !exec.tensor<[4, 8], f32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.qkv: 'kv_heads' is missing: key and value heads of one rank
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %x = exec.embedding %t -> !exec.tensor<[4, 8], bf16, @g0>
  %q = exec.qkv %x {heads = 4, head_dim = 2} -> !exec.tensor<[4, 16], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.qkv: the result is [4, 12] bf16
// CHECK: it must be [4, 16] bf16
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %x = exec.embedding %t -> !exec.tensor<[4, 8], bf16, @g0>
  %q = exec.qkv %x {heads = 4, kv_heads = 2, head_dim = 2} -> !exec.tensor<[4, 12], bf16, @g0>
  exec.yield
}

// -----

// Attention.
// CHECK: error: exec.decode_attention: 4 heads do not share 3 kv_heads evenly
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %q = exec.embedding %t -> !exec.tensor<[1, 20], bf16, @g0>
  %kv = exec.kv_load -> !exec.tensor<[9, 2, 3, 2], bf16, @g0>
  %a, %new = exec.decode_attention %q, %kv {heads = 4, kv_heads = 3, head_dim = 2} context #pd.column<9> -> !exec.tensor<[1, 8], bf16, @g0>, !exec.tensor<[1, 2, 3, 2], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.decode_attention: the first operand has 20 columns
// CHECK: 4 heads and twice 2 kv_heads of 2 are 16
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %q = exec.embedding %t -> !exec.tensor<[1, 20], bf16, @g0>
  %kv = exec.kv_load -> !exec.tensor<[9, 2, 2, 2], bf16, @g0>
  %a, %new = exec.decode_attention %q, %kv {heads = 4, kv_heads = 2, head_dim = 2} context #pd.column<9> -> !exec.tensor<[1, 8], bf16, @g0>, !exec.tensor<[1, 2, 2, 2], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.prefill_attention: a request has a token at least in a step, and no negative context
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %q = exec.embedding %t -> !exec.tensor<[1, 16], bf16, @g0>
  %kv = exec.kv_load -> !exec.tensor<[9, 2, 2, 2], bf16, @g0>
  %a, %new = exec.prefill_attention %q, %kv {heads = 4, kv_heads = 2, head_dim = 2} begin #pd.column<9> end #pd.column<9> -> !exec.tensor<[0, 8], bf16, @g0>, !exec.tensor<[0, 2, 2, 2], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.prefill_attention: 1 begins and 2 ends
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %q = exec.embedding %t -> !exec.tensor<[1, 16], bf16, @g0>
  %kv = exec.kv_load -> !exec.tensor<[9, 2, 2, 2], bf16, @g0>
  %a, %new = exec.prefill_attention %q, %kv {heads = 4, kv_heads = 2, head_dim = 2} begin #pd.column<9> end #pd.column<10, 10> -> !exec.tensor<[1, 8], bf16, @g0>, !exec.tensor<[1, 2, 2, 2], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.decode_attention: rows [1, 2) of 1
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %q = exec.embedding %t -> !exec.tensor<[1, 16], bf16, @g0>
  %kv = exec.kv_load -> !exec.tensor<[9, 2, 2, 2], bf16, @g0>
  %a, %new = exec.decode_attention %q, %kv {heads = 4, kv_heads = 2, head_dim = 2, first = 1} context #pd.column<9> -> !exec.tensor<[1, 8], bf16, @g0>, !exec.tensor<[1, 2, 2, 2], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.decode_attention: the KV is [9, 2, 2, 2] bf16
// CHECK: it must be [8, 2, 2, 2] bf16
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %q = exec.embedding %t -> !exec.tensor<[1, 16], bf16, @g0>
  %kv = exec.kv_load -> !exec.tensor<[9, 2, 2, 2], bf16, @g0>
  %a, %new = exec.decode_attention %q, %kv {heads = 4, kv_heads = 2, head_dim = 2} context #pd.column<8> -> !exec.tensor<[1, 8], bf16, @g0>, !exec.tensor<[1, 2, 2, 2], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.decode_attention: the second result is [1, 2, 2, 2] bf16
// CHECK: it must be [1, 2, 2, 2] int8
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %q = exec.embedding %t -> !exec.tensor<[1, 16], bf16, @g0>
  %kv = exec.kv_load -> !exec.tensor<[9, 2, 2, 2], int8, @g0>
  %a, %new = exec.decode_attention %q, %kv {heads = 4, kv_heads = 2, head_dim = 2} context #pd.column<9> -> !exec.tensor<[1, 8], bf16, @g0>, !exec.tensor<[1, 2, 2, 2], bf16, @g0>
  exec.yield
}

// -----

// A column is a column.
// CHECK: error: #pd.names<"a"> should be of base attribute pd.column
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %q = exec.embedding %t -> !exec.tensor<[1, 16], bf16, @g0>
  %kv = exec.kv_load -> !exec.tensor<[9, 2, 2, 2], bf16, @g0>
  %a, %new = exec.decode_attention %q, %kv {heads = 4, kv_heads = 2, head_dim = 2} context #pd.names<"a"> -> !exec.tensor<[1, 8], bf16, @g0>, !exec.tensor<[1, 2, 2, 2], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.projection: its parts must be as wide as each other, and of one type
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %a = exec.embedding %t -> !exec.tensor<[1, 16], bf16, @g0>
  %b = exec.embedding %t -> !exec.tensor<[1, 8], bf16, @g0>
  %p = exec.projection %a, %b -> !exec.tensor<[2, 8], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.projection: the result is [1, 8] bf16
// CHECK: it must be [2, 8] bf16
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %a = exec.embedding %t -> !exec.tensor<[1, 16], bf16, @g0>
  %p = exec.projection %a, %a -> !exec.tensor<[1, 8], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.ffn: experts and experts_per_token: both, or none
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %a = exec.embedding %t -> !exec.tensor<[1, 8], bf16, @g0>
  %f = exec.ffn %a {width = 12, experts = 4} -> !exec.tensor<[1, 8], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.ffn: the result is [1, 12] bf16
// CHECK: it must be [1, 8] bf16
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[1], i32, @g0>
  %a = exec.embedding %t -> !exec.tensor<[1, 8], bf16, @g0>
  %f = exec.ffn %a {width = 12} -> !exec.tensor<[1, 12], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.lm_head: a row is outside of the 2 that there are
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %a = exec.embedding %t -> !exec.tensor<[2, 8], bf16, @g0>
  %l = exec.lm_head %a rows #pd.column<2> -> !exec.tensor<[1, 20], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.lm_head: the result is [2, 20] bf16
// CHECK: it must be [1, 20] bf16
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %a = exec.embedding %t -> !exec.tensor<[2, 8], bf16, @g0>
  %l = exec.lm_head %a rows #pd.column<1> -> !exec.tensor<[2, 20], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.sample: the result is [2] bf16
// CHECK: it must be [2] i32
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %a = exec.embedding %t -> !exec.tensor<[2, 8], bf16, @g0>
  %s = exec.sample %a -> !exec.tensor<[2], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.slice: rows [1, 3) of 2
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %s = exec.slice %t {first = 1} -> !exec.tensor<[2], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.slice: the result is [1, 4] bf16
// CHECK: it must be [1, 8] bf16
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %a = exec.embedding %t -> !exec.tensor<[2, 8], bf16, @g0>
  %s = exec.slice %a -> !exec.tensor<[1, 4], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.concat: its parts must be as wide as each other, and of one type
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %a = exec.embedding %t -> !exec.tensor<[2, 8], bf16, @g0>
  %c = exec.concat %a, %t -> !exec.tensor<[4, 8], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.concat: the result is [2] i32
// CHECK: it must be [4] i32
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %c = exec.concat %t, %t -> !exec.tensor<[2], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.concat: a tensor without dimensions has no rows
%s = exec.recv {channel = 0} from @g1 -> !exec.tensor<[], i32, @g0>
%c = exec.concat %s, %s -> !exec.tensor<[2], i32, @g0>

// -----

// CHECK: error: exec.slice: a tensor without dimensions has no rows
%s = exec.recv {channel = 0} from @g1 -> !exec.tensor<[], i32, @g0>
%c = exec.slice %s -> !exec.tensor<[2], i32, @g0>

// -----

// CHECK: error: exec.all_reduce: 0 tensors in, 0 out
// CHECK: as many, and one at least
"exec.all_reduce"() <{ranks = [@g0, @g1]}> : () -> ()

// -----

// Ranks.
// CHECK: error: exec.all_reduce: a group has two devices at least, each once
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %c = exec.all_reduce %t over [@g0, @g0] -> !exec.tensor<[2], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.all_reduce: its tensors are on @g0, which is not of its group
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %c = exec.all_reduce %t over [@g1, @g2] -> !exec.tensor<[2], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.all_reduce: 1 tensors in, 2 out
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %c, %d = exec.all_reduce %t over [@g0, @g1] -> !exec.tensor<[2], i32, @g0>, !exec.tensor<[2], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.all_reduce: a result is [4] i32
// CHECK: it must be [2] i32
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %c = exec.all_reduce %t over [@g0, @g1] -> !exec.tensor<[4], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.all_gather: a result is [2] i32
// CHECK: it must be [4] i32
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %c = exec.all_gather %t over [@g0, @g1] -> !exec.tensor<[2], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.all_gather: axis 1 of 1 dimensions
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[2], i32, @g0>
  %c = exec.all_gather %t {axis = 1} over [@g0, @g1] -> !exec.tensor<[4], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.reduce_scatter: 3 does not split over 2 ranks
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[3], i32, @g0>
  %c = exec.reduce_scatter %t over [@g0, @g1] -> !exec.tensor<[1], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: Expected 'over' and the devices, [@a, @b]
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[3], i32, @g0>
  %c = exec.all_reduce %t -> !exec.tensor<[3], i32, @g0>
  exec.yield
}

// -----

// Messages.
// CHECK: error: exec.send: both ends are @g0
// CHECK: a message goes to another device
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[3], i32, @g0>
  exec.send %t {channel = 1} to @g0
  %u = exec.recv {channel = 1} from @g0 -> !exec.tensor<[3], i32, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.send: 'channel' is missing: by which send and recv find each other
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[3], i32, @g0>
  exec.send %t to @g1
  %u = exec.recv {channel = 0} from @g0 -> !exec.tensor<[3], i32, @g1>
  exec.yield
}

// -----

// CHECK: error: exec.graph @a: what is sent on channel 1 nobody receives
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[3], i32, @g0>
  exec.send %t {channel = 1} to @g1
  exec.yield
}

// -----

// CHECK: error: exec.graph @a: exec.recv on channel 2 has no exec.send above it that is still to be received
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[3], i32, @g0>
  exec.send %t {channel = 1} to @g1
  %u = exec.recv {channel = 2} from @g0 -> !exec.tensor<[3], i32, @g1>
  exec.yield
}

// -----

// CHECK: error: exec.graph @a: exec.recv on channel 1 has no exec.send above it that is still to be received
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[3], i32, @g0>
  exec.send %t {channel = 1} to @g1
  %u = exec.recv {channel = 1} from @g0 -> !exec.tensor<[3], i32, @g1>
  %v = exec.recv {channel = 1} from @g0 -> !exec.tensor<[3], i32, @g1>
  exec.yield
}

// -----

// CHECK: error: exec.graph @a: channel 1 has two exec.send
// CHECK: one each
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[3], i32, @g0>
  exec.send %t {channel = 1} to @g1
  exec.send %t {channel = 1} to @g1
  exec.yield
}

// -----

// CHECK: error: exec.graph @a: channel 1 sends [3] i32 and receives [4] i32
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[3], i32, @g0>
  exec.send %t {channel = 1} to @g1
  %u = exec.recv {channel = 1} from @g0 -> !exec.tensor<[4], i32, @g1>
  exec.yield
}

// -----

// CHECK: error: exec.graph @a: channel 1 goes from @g0 to @g1, and comes from @g0 to @g2
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[3], i32, @g0>
  exec.send %t {channel = 1} to @g1
  %u = exec.recv {channel = 1} from @g0 -> !exec.tensor<[3], i32, @g2>
  exec.yield
}

// -----

// Streams.
// CHECK: error: exec.graph @a: exec.embedding on stream compute uses what exec.input makes on stream copy
// CHECK: put an exec.wait between them
exec.graph @a {model = "m"} {
  %t = exec.input {stream = "copy"} -> !exec.tensor<[3], i32, @g0>
  %x = exec.embedding %t -> !exec.tensor<[3, 8], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.wait: the result is [2] i32
// CHECK: it must be [3] i32
exec.graph @a {model = "m"} {
  %t = exec.input {stream = "copy"} -> !exec.tensor<[3], i32, @g0>
  %u = exec.wait %t -> !exec.tensor<[2], i32, @g0>
  exec.yield
}

// -----

// KV.
// CHECK: error: exec.kv_store: the KV has 1 dimensions
// CHECK: it must have 4
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[3], i32, @g0>
  exec.kv_store %t
  exec.yield
}

// -----

// CHECK: error: exec.kv_load: 'tier' is "cloud"
// CHECK: one of: device, host, disk
exec.graph @a {model = "m"} {
  %kv = exec.kv_load {tier = "cloud"} -> !exec.tensor<[3, 2, 2, 2], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.kv_migrate: the KV is on @g0 already
// CHECK: name another device
exec.graph @a {model = "m"} {
  %kv = exec.kv_load -> !exec.tensor<[3, 2, 2, 2], bf16, @g0>
  %there = exec.kv_migrate %kv -> !exec.tensor<[3, 2, 2, 2], bf16, @g0>
  exec.yield
}

// -----

// CHECK: error: exec.kv_migrate: the result is [3, 2, 2, 2] int8
// CHECK: it must be [3, 2, 2, 2] bf16
exec.graph @a {model = "m"} {
  %kv = exec.kv_load -> !exec.tensor<[3, 2, 2, 2], bf16, @g0>
  %there = exec.kv_migrate %kv -> !exec.tensor<[3, 2, 2, 2], int8, @g1>
  exec.yield
}

// -----

// Graphs.
// CHECK: error: exec.graph: 'model' is missing: the cluster.model that it computes
exec.graph @a {
  exec.yield
}

// -----

// CHECK: error: exec.graph: 'phase' is "both"
// CHECK: one of: prefill, decode, hybrid
exec.graph @a {model = "m", phase = "both"} {
  exec.yield
}

// -----

// CHECK: error: exec.graph @a must end with exec.yield
exec.graph @a {model = "m"} {
  %t = exec.input -> !exec.tensor<[3], i32, @g0>
}

// -----

// What is made below is not there yet.
// CHECK: error: exec.graph @a: exec.embedding uses a value that is made below it, or elsewhere
"exec.graph"() <{sym_name = "a", model = "m"}> ({
  %x = "exec.embedding"(%t) : (!exec.tensor<[3], i32, @g0>) -> !exec.tensor<[3, 8], bf16, @g0>
  %t = "exec.input"() : () -> !exec.tensor<[3], i32, @g0>
  "exec.yield"() : () -> ()
}) : () -> ()

// -----

// CHECK: error: %nobody is not defined above
exec.graph @a {model = "m"} {
  %x = exec.embedding %nobody -> !exec.tensor<[3, 8], bf16, @g0>
  exec.yield
}

// -----

// Only operators and what is theirs.
// CHECK: error: exec.graph @a: pd.yield is no operator
exec.graph @a {model = "m"} {
  pd.yield
  exec.yield
}
