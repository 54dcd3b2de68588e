// A driver from before the calls that PARAM needs: it can say its version, and no more.
extern "C" __attribute__((visibility("default"))) int cuInit(unsigned) { return 0; }
extern "C" __attribute__((visibility("default"))) int cuDriverGetVersion(int* version) { return *version = 9020, 0; }
