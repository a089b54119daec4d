// Two requests, an instance that prefills and one that decodes: the README's tour.

model tiny from "models/tiny"

cluster pair {
  devices cpu0..cpu1 kind cpu
  link cpu0 to cpu1 bandwidth 10GB/s latency 5us
  instance p0 role prefill on cpu0 engine torch kv_blocks 64 budget 16
  instance d0 role decode on cpu1 engine torch kv_blocks 64
}

serve on pair with fifo mode strict {
  request "token" prompt "Question: What is a token?\nAnswer:" generate 40
  request "prefill" prompt "Question: What is prefill?\nAnswer:" generate 40
}
