#if defined(__x86_64__)
#define CHUNKFT_LOOPS kAvx512AdamwLoops
#define CHUNKFT_LOOPS_NAME "avx512"
#include "host_adamw_loops.inc"
#endif
