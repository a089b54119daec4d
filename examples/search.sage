// Four devices, and a workload with promises: how should the devices be dealt out?
//
//     sagec search examples/search.sage --limit 60 --best 2
//
// The instance below says what every layout has: the model, the block and the budget.

model llama-8b {
  layers 32
  hidden 4096
  heads 32
  kv_heads 8
  ffn 14336
  vocab 128256
  dtype bf16
  max_context 16384
}

cluster box {
  devices g0..g3 kind h100
  switch nv
  link g0..g3 to nv bandwidth 450GB/s latency 2us
  instances i0..i3 on g0..g3 engine sim block 64 budget 2048 max_batch 128
}

strategy short-first {
  order by prompt_tokens, arrival
}

serve on box mode hybrid ttft 400ms tpot 30ms {
  request "ask" tokens 300 generate 120 samples 40
  request "read" tokens 5000 generate 60 samples 12
  request "write" tokens 200 generate 500 samples 8
}
