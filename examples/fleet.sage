// A fleet that nobody needs to own: it compiles, and the plans say what would run where.
//
//     sagec compile --emit ir examples/fleet.sage

model llama-8b {
  layers 32
  hidden 4096
  heads 32
  kv_heads 8
  ffn 14336
  vocab 128256
  dtype bf16
  max_context 131072
}

cluster fleet {
  devices g0..g7 kind h100
  devices g8..g15 kind h200
  switches nv0, nv1, spine
  link g0..g7 to nv0 bandwidth 450GB/s latency 2us
  link g8..g15 to nv1 bandwidth 450GB/s latency 2us
  link nv0, nv1 to spine bandwidth 400Gbit/s latency 5us

  // Prompts are bound by arithmetic, so they get the smaller memories: two ranks an instance.
  instances p0..p3 role prefill on g0..g7 engine sim tp 2 block 64 budget 8192
  instances d0..d3 role decode on g8..g15 engine sim tp 2 block 64 max_batch 256
}

serve on fleet with fifo mode strict chunk 2048 ttft 500ms tpot 40ms {
  request "report" tokens 24000 generate 800 tenant "finance"
  request "chat-1" tokens 1200 generate 300 tenant "support" priority 1
  request "chat-2" tokens 900 generate 250 arrives 40ms tenant "support" priority 1
  request "code" tokens 6000 generate 1200 arrives 60ms tenant "tools" session "s-17"
}
