/* A slow disk, as a library to preload: every fsync and fdatasync takes SLOWSYNC_MS milliseconds more.
 *
 * SLOWSYNC_COUNT names a file of 8 bytes that counts the calls (native 64-bit integer, all processes that share the
 * file together); it can be read while they run, which shows that the library is in effect. With SLOWSYNC_MS=0 it only counts.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static struct timespec pause_;
static _Atomic uint64_t own, *count = &own;
static int (*real_fsync)(int), (*real_fdatasync)(int);

__attribute__((constructor)) static void set_up(void)
{
    const char *ms = getenv("SLOWSYNC_MS"), *path = getenv("SLOWSYNC_COUNT");
    double seconds = ms ? atof(ms) / 1000 : 0;
    pause_.tv_sec = (time_t)seconds;
    pause_.tv_nsec = (long)((seconds - (double)pause_.tv_sec) * 1e9);
    real_fsync = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    int file = path ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (file < 0)
        return;
    if (ftruncate(file, sizeof own) == 0) {
        void *shared = mmap(NULL, sizeof own, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (shared != MAP_FAILED)
            count = shared;
    }
    close(file);
}

static int slow(int (*real)(int), int file)
{
    struct timespec left = pause_;
    while ((left.tv_sec || left.tv_nsec) && nanosleep(&left, &left) == -1 && errno == EINTR)
        ;
    atomic_fetch_add(count, 1);
    return real(file);
}

int fsync(int file)
{
    return slow(real_fsync, file);
}

int fdatasync(int file)
{
    return slow(real_fdatasync, file);
}
