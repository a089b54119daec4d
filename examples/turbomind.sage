// LMDeploy's TurboMind, split into an instance that computes prompts and one that writes outputs:
//   sagec run examples/turbomind.sage
// With maths=toy it needs no GPU: the scheduler is TurboMind's own, the model a toy, and so the
// texts are nonsense. On a GPU machine leave that word out, and say kind h100, or what yours is.

model tiny from "models/tiny"

cluster card {
  device g0 kind cpu
  instance p0 role prefill on g0 engine turbomind model tiny kv_blocks 64 block 64 budget 64
      options "maths=toy"
  instance d0 role decode on g0 engine turbomind model tiny kv_blocks 64 block 64 max_batch 16
      options "maths=toy"
}

serve on card with fifo mode strict chunk 48 {
  request "story" prompt "Once upon a time" generate 40
  request "long" tokens 150 generate 24
  request "later" tokens 90 generate 32 arrives 20ms
}
