"""How good a model's reconstructions are: PSNR, SSIM, LPIPS, rFVD and seams, by frame, by clip and over all."""
