/* A PC as a kernel's first week knows it: ports, COM1, CMOS, PCI, and the ways to end. */
#pragma once
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 inw(u16 port) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 inl(u16 port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }

enum { COM1 = 0x3f8, COM2 = 0x2f8, COM3 = 0x3e8, COM4 = 0x2e8 };

static void com_open(u16 base) {
    outb(base + 1, 0); outb(base + 3, 0x80); outb(base, 1); outb(base + 1, 0);
    outb(base + 3, 3); outb(base + 2, 0xc7); outb(base + 4, 0x0b);
}
static void com_put(u16 base, char c) { while (!(inb(base + 5) & 0x20)) ; outb(base, c); }
static void com_say(u16 base, const char *text) { for (; *text; text++) { if (*text == '\n') com_put(base, '\r'); com_put(base, *text); } }
static u8 com_get(u16 base) { while (!(inb(base + 5) & 1)) ; return inb(base); }
static void say(const char *text) { com_say(COM1, text); }
static void say_hex(u32 value) { say("0x"); for (int i = 28; i >= 0; i -= 4) com_put(COM1, "0123456789abcdef"[value >> i & 15]); }
static void say_number(u32 value) {
    char text[12]; int at = 11; text[at] = 0;
    do { text[--at] = '0' + value % 10; value /= 10; } while (value);
    say(text + at);
}

static u8 cmos(u8 at) { outb(0x70, at); return inb(0x71); }
static void set_cmos(u8 at, u8 value) { outb(0x70, at); outb(0x71, value); }

static void power_off(void) { outw(0x604, 0x2000); outw(0xb004, 0x2000); for (;;) __asm__ volatile("hlt"); }
static void reset(void) { outb(0xcf9, 2); outb(0xcf9, 6); for (;;) ; }
static void triple_fault(void) {
    struct { u16 limit; u32 base; } __attribute__((packed)) none = {0, 0};
    __asm__ volatile("lidt %0; int3" ::"m"(none));
}

static u32 pci_read(u32 bus, u32 slot, u32 function, u32 at) {
    outl(0xcf8, 0x80000000u | bus << 16 | slot << 11 | function << 8 | (at & 0xfc));
    return inl(0xcfc);
}
static void pci_write(u32 bus, u32 slot, u32 function, u32 at, u32 value) {
    outl(0xcf8, 0x80000000u | bus << 16 | slot << 11 | function << 8 | (at & 0xfc));
    outl(0xcfc, value);
}
