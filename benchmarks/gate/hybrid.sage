// Chats on two instances that do both phases: steady, with prefixes that tenants share.

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
  devices g0..g1 kind a100
  instances i0..i1 role both on g0..g1 engine sim block 16 budget 1024 max_batch 128
      options "prefix_cache=on"
}

serve on c mode hybrid chunk 512 horizon 64 ttft 1s tpot 60ms {
  replay "sessions.jsonl"
}
