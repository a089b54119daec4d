// The same chats with prefill and decode apart, over one link that all hand-overs share.

model llama-8b {
  layers 32
  hidden 4096
  heads 32
  kv_heads 8
  ffn 14336
  vocab 128256
  dtype bf16
  max_context 32768
}

cluster c {
  devices g0..g3 kind a100
  switches left, right
  link g0..g1 to left bandwidth 200GB/s latency 2us
  link g2..g3 to right bandwidth 200GB/s latency 2us
  link left to right bandwidth 25GB/s latency 5us
  instances p0..p1 role prefill on g0..g1 engine sim block 16 budget 2048 options "prefix_cache=on"
  instances d0..d1 role decode on g2..g3 engine sim block 16 max_batch 128
}

serve on c mode strict chunk 1024 horizon 64 ttft 1s tpot 60ms {
  replay "sessions.jsonl" rate 1.5
}
