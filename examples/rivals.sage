// One instance, two kinds of guests: long reads that nobody waits for, and questions that somebody
// waits for. The reads come first, and the KV holds three of them at a time.
//
//     sagec run examples/rivals.sage --strategy fifo
//     sagec run examples/rivals.sage --strategy slo-aware
//
// First come, first served lets the questions wait behind all reads; slo-aware lets go first who was
// promised an early first token.

model tiny from "models/tiny"

cluster desk {
  device cpu kind cpu
  instance i0 role both on cpu engine torch model tiny kv_blocks 48 block 16 budget 64
}

serve on desk with fifo mode hybrid chunk 32 horizon 8 {
  request "read-1" tokens 180 generate 50 tenant night
  request "read-2" tokens 181 generate 50 tenant night
  request "read-3" tokens 182 generate 50 tenant night
  request "read-4" tokens 183 generate 50 tenant night
  request "read-5" tokens 184 generate 50 tenant night
  request "read-6" tokens 185 generate 50 tenant night
  request "read-7" tokens 186 generate 50 tenant night
  request "read-8" tokens 187 generate 50 tenant night
  request "read-9" tokens 188 generate 50 tenant night
  request "token" prompt "Question: What is a token?\nAnswer:" generate 24 arrives 5ms ttft 150ms
      tenant day
  request "prefill" prompt "Question: What is prefill?\nAnswer:" generate 24 arrives 10ms ttft 150ms
      tenant day
  request "block" prompt "Question: What is a block?\nAnswer:" generate 24 arrives 15ms ttft 150ms
      tenant day
}
