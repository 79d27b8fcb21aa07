/* What a shell in the guest cannot do to its devices. Built static by the tests, run in the guest:
 *   peripherals cursor COLOUR X Y   show a 64x64 cursor of one ARGB colour (hex) with its corner there; say "shown"; wait for a line
 *   peripherals emergency TEXT      write each character to the console device's emerg_wr (VIRTIO 1.3, 5.3.4) */
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static void die(const char *what) { perror(what); exit(1); }

/* linux/drm.h, drm_mode.h */
struct res { uint64_t fbs, crtcs, connectors, encoders; uint32_t nfbs, ncrtcs, nconnectors, nencoders, limits[4]; };
struct dumb { uint32_t height, width, bpp, flags, handle, pitch; uint64_t size; };
struct map { uint32_t handle, pad; uint64_t offset; };
struct cursor { uint32_t flags, crtc; int32_t x, y; uint32_t width, height, handle; int32_t hot_x, hot_y; };
#define GETRESOURCES _IOWR('d', 0xA0, struct res)
#define CREATE_DUMB _IOWR('d', 0xB2, struct dumb)
#define MAP_DUMB _IOWR('d', 0xB3, struct map)
#define CURSOR2 _IOWR('d', 0xBB, struct cursor)

static void cursor(uint32_t colour, int x, int y) {
    int fd = open("/dev/dri/card0", O_RDWR);
    uint32_t crtcs[16] = {0};
    struct res res = {.crtcs = (uintptr_t)crtcs, .ncrtcs = 16};
    if (fd < 0 || ioctl(fd, GETRESOURCES, &res)) die("card0");
    struct dumb dumb = {.height = 64, .width = 64, .bpp = 32};
    if (ioctl(fd, CREATE_DUMB, &dumb)) die("CREATE_DUMB");
    struct map map = {.handle = dumb.handle};
    if (ioctl(fd, MAP_DUMB, &map)) die("MAP_DUMB");
    uint32_t *pixels = mmap(0, dumb.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, map.offset);
    if (pixels == MAP_FAILED) die("mmap");
    for (int i = 0; i < 64 * 64; i++) pixels[i] = colour;
    struct cursor show = {.flags = 1, .crtc = crtcs[0], .width = 64, .height = 64, .handle = dumb.handle};
    struct cursor move = {.flags = 2, .crtc = crtcs[0], .x = x, .y = y};
    if (ioctl(fd, CURSOR2, &show) || ioctl(fd, CURSOR2, &move)) die("CURSOR2");
    puts("shown");
    fflush(stdout);
    getchar();
}

static void emergency(const char *text) {
    DIR *devices = opendir("/sys/bus/pci/devices");
    for (struct dirent *entry; (entry = readdir(devices));) {
        char path[300];
        uint8_t config[256] = {0};
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/config", entry->d_name);
        int fd = open(path, O_RDWR);
        if (fd < 0 || read(fd, config, 256) < 64 || config[0] != 0xf4 || config[1] != 0x1a ||
            (config[2] | config[3] << 8) != 0x1040 + 3) {
            close(fd);
            continue;
        }
        /* 4.1.4: cfg_type 4 says where the device's configuration is, 5 is a window on any place (4.1.4.9). */
        uint8_t device[16] = {0};
        int window = 0;
        for (int at = config[0x34]; at; at = config[at + 1]) {
            if (config[at] == 9 && config[at + 3] == 4) memcpy(device, config + at, 16);
            if (config[at] == 9 && config[at + 3] == 5) window = at;
        }
        uint32_t offset, size = 4;
        memcpy(&offset, device + 8, 4);
        offset += 8;
        if (pwrite(fd, device + 4, 1, window + 4) != 1 || pwrite(fd, &offset, 4, window + 8) != 4 ||
            pwrite(fd, &size, 4, window + 12) != 4)
            die(path);
        for (; *text; text++) {
            uint32_t character = *text;
            if (pwrite(fd, &character, 4, window + 16) != 4) die(path);
        }
        puts("written");
        return;
    }
    fputs("no console device\n", stderr);
    exit(1);
}

int main(int argc, char **argv) {
    if (argc == 5 && !strcmp(argv[1], "cursor")) cursor(strtoul(argv[2], 0, 16), atoi(argv[3]), atoi(argv[4]));
    else if (argc == 3 && !strcmp(argv[1], "emergency")) emergency(argv[2]);
    else return 2;
    return 0;
}
