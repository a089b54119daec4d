// RUN: sagec compile --emit ir --pipeline order %s | filecheck %s

// A shape in a block; what follows from it need not be said.
// CHECK: cluster.model @m {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688, vocab = 1024
model m { layers 4 hidden 256 heads 8 kv_heads 2 ffn 688 vocab 1024 }

cluster c {
  // A known kind brings its numbers; the others of a range are like the first.
  // CHECK-NEXT: cluster.device @g0 {kind = "h200", memory_bytes = 151397597184, flops_per_s = 990000000000000.0
  // CHECK-NEXT: cluster.device @g1 like @g0
  devices g0..g1 kind h200

  // Numbers of its own win.
  // CHECK-NEXT: cluster.device @x {kind = "h200", memory_bytes = 1000000000
  device x kind h200 memory 1GB

  // CHECK-NEXT: cluster.switch @s
  switch s

  // Each of a list is joined; bits per second become bytes.
  // CHECK-NEXT: cluster.link @g0 to @s {bytes_per_s = 50000000000.0, latency_us = 1500.0}
  // CHECK-NEXT: cluster.link @g1 to @s {bytes_per_s = 50000000000.0, latency_us = 1500.0}
  link g0..g1 to s bandwidth 400Gbit/s latency 1.5ms
  // CHECK-NEXT: cluster.link @x to @s
  link x to s

  // As many tensor parallel ranks as devices; a cache said as a size becomes blocks.
  // CHECK-NEXT: cluster.instance @p on [@g0, @g1] engine "sim" role prefill model @m {tp = 2, kv_blocks = 65536}
  instance p role prefill on g0, g1 engine sim kv 1GiB
  // CHECK-NEXT: cluster.instance @d on [@x] engine "sim" role decode model @m {tp = 1, kv_blocks = 9, block_tokens = 64, max_batch = 7}
  instance d role decode on x engine sim kv_blocks 9 block 64 max_batch 7
  // Two that share a device compute by turns, and a turn takes a while to begin.
  // CHECK-NEXT: cluster.instance @a on [@x] engine "sim" role both model @m {tp = 1, kv_blocks = 9, pool = "shared", switch_us = 800000, options = "eviction=arc"}
  // CHECK-NEXT: cluster.instance @b on [@x] engine "sim" role both model @m {tp = 1, kv_blocks = 9, pool = "shared"}
  instance a on x engine sim kv_blocks 9 pool shared switch_time 800ms options "eviction=arc"
  instance b on x engine sim kv_blocks 9 pool shared
}
