// Included before llama.cpp's sources. GCC 12's _tile_loadconfig tells the compiler that it reads 8 bytes of the 64 that it does; the
// stores of the others are dropped as dead, and the program crashes at its first prompt.
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char (*)[64])(config)))
#endif
